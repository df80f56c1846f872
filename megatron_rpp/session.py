"""Everything a training run needs, built once and closed once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_rpp.checkpoint.manager import latest_checkpoint, load_checkpoint, save_checkpoint
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config.load import dump_toml
from megatron_rpp.config.schema import Config
from megatron_rpp.data.prompts import PromptSource, load_prompts
from megatron_rpp.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_rpp.engine.advantages import ShapingState
from megatron_rpp.engine.optimizer import Optimizer, make_trainable
from megatron_rpp.experience.types import Prompt
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.observability.reporter import Reporter
from megatron_rpp.observability.timers import Timers
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.parity.monitor import ParityMonitor
from megatron_rpp.parity.run_parts import RunParts
from megatron_rpp.reward.build import build_reward
from megatron_rpp.reward.protocol import Reward
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.weight_sync.build import build_engine, check_weight_sync
from megatron_rpp.weight_sync.synced_engine import SyncedRolloutEngine

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """One rank's parts of a run. Only `shaping` is replaced, once a step."""

    config: Config
    parallel: ParallelContext
    tokenizer: Tokenizer
    prompt_source: PromptSource
    eval_prompts: list[Prompt]
    reward: Reward
    eval_reward: Reward
    policy: Model
    reference: Model | None  # None where no KL is used
    optimizer: Optimizer
    rollout_engine: SyncedRolloutEngine
    parity: ParityMonitor
    reporter: Reporter
    first_step: int
    shaping: ShapingState
    timers: Timers

    def sampling(self, step: int) -> SamplingParams:
        """How this step's training responses are sampled; every step has its own seed."""
        return SamplingParams(
            num_samples_per_prompt=self.config.algorithm.num_samples_per_prompt,
            max_response_tokens=self.config.rollout.max_response_tokens,
            temperature=self.config.rollout.temperature,
            top_p=self.config.rollout.top_p,
            stop_token_ids=self.tokenizer.eos_token_ids,
            seed=self.config.run.seed * 1_000_003 + step,
        )

    def greedy(self) -> SamplingParams:
        """One greedy response a prompt."""
        return replace(self.sampling(0), num_samples_per_prompt=1, temperature=0.0)

    def save(self, step: int) -> None:
        """Write the checkpoint of the state after `step` rollout batches. A collective over the whole job."""
        state = RunState(
            step=step,
            prompts=self.prompt_source.state_dict(),
            schedule=self.optimizer.schedule.state_dict(),
            shaping=asdict(self.shaping),
        )
        keep, source = self.config.checkpoint.keep, self.config.model.path
        save_checkpoint(self.config.run.dir, self.policy, self.optimizer, state, keep, source)


@contextmanager
def open_session(config: Config, *, resume: bool) -> Iterator[Session]:
    """Build a run, user errors first and servers early; stop what was started, however the run ends.

    Raises ValueError for what only the data, the tokenizer or the ranks can tell.
    """
    parallel = bootstrap.initialize(config.parallel, config.run.seed, longest_wait_s(config))
    with ExitStack() as stack:
        stack.callback(bootstrap.shutdown)
        tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
        hf = read_hf_config(config.model.path)
        check_vocabulary(tokenizer, hf.vocab_size, config.model.path)
        check_weight_sync(config, hf)
        prompts, eval_prompts = _prompts(config, tokenizer)
        prompt_source = PromptSource(prompts, config.rollout.num_prompts, config.run.seed)
        reward = build_reward(config.reward, config.data.train)
        stack.callback(reward.close)
        eval_reward = build_reward(config.reward, config.data.eval) if eval_prompts else reward
        stack.callback(eval_reward.close)
        client = SGLangClient((), config.rollout, tokenizer.decode)
        fleet = ServerFleet(config) if parallel.rank == 0 else None
        if fleet is not None:
            stack.callback(fleet.stop)
        policy, optimizer = make_trainable(
            build_model(config, parallel, path=config.model.path), config.optimizer, total_optimizer_steps(config)
        )
        reference = build_model(config, parallel, path=config.model.path) if config.algorithm.uses_reference else None
        logger.info("preset %s, estimator %s", config.algorithm.preset, config.algorithm.estimator)
        first_step, shaping = 0, ShapingState()
        if resume:
            first_step, shaping = _resume(config, policy, optimizer, prompt_source)
        engine = build_engine(config, policy, fleet, client)
        stack.callback(engine.close)
        engine.wait_ready()
        engine.sync(first_step)
        parity = ParityMonitor(RunParts(config, policy, engine, client, tokenizer))
        replica = parallel.dp_rank if parallel.is_replica_leader else None
        reporter = stack.enter_context(
            Reporter(config.run.dir, rank=parallel.rank, replica=replica, steps=range(first_step, config.run.steps))
        )
        if parallel.rank == 0:
            (Path(config.run.dir) / "config.toml").write_text(dump_toml(config))
        yield Session(
            config, parallel, tokenizer, prompt_source, eval_prompts, reward, eval_reward, policy, reference,
            optimizer, engine, parity, reporter, first_step, shaping, Timers(),
        )  # fmt: skip


def longest_wait_s(config: Config) -> float:
    """The longest that ranks may have to wait for one that talks to a server."""
    rollout, sync = config.rollout, config.weight_sync
    return max(rollout.request_deadline_s, rollout.startup_deadline_s, sync.deadline_s)


def total_optimizer_steps(config: Config) -> int:
    """Optimizer steps of the whole run, for the learning-rate schedule."""
    responses = config.rollout.num_prompts * config.algorithm.num_samples_per_prompt
    return config.run.steps * (responses // config.train.batch_size)


def _prompts(config: Config, tokenizer: Tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts)."""
    longest = config.rollout.context_length - config.rollout.max_response_tokens
    train = load_prompts(config.data.train, config.data, tokenizer, max_prompt_tokens=longest)
    if config.eval.interval == 0 or not config.data.eval.is_set:
        return train, []
    source = replace(config.data.eval, size=min(config.data.eval.size, config.eval.num_prompts))
    return train, load_prompts(source, config.data, tokenizer, max_prompt_tokens=longest)


def _resume(
    config: Config, policy: Model, optimizer: Optimizer, prompt_source: PromptSource
) -> tuple[int, ShapingState]:
    """Load the newest checkpoint: (the first step to run, the state of reward shaping)."""
    path = latest_checkpoint(config.run.dir)
    if path is None:
        raise ValueError(f"--resume: run.dir={config.run.dir} holds no complete checkpoint; start without --resume")
    state = load_checkpoint(path, policy, optimizer)
    prompt_source.load_state_dict(state.prompts)
    logger.info("resumed from %s", path)
    return state.step, ShapingState.from_dict(state.shaping)
