"""Everything a training run needs, built once and closed once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from megatron_rpp.checkpoint.fence import Fence
from megatron_rpp.checkpoint.find import find_checkpoint
from megatron_rpp.checkpoint.manager import Checkpointer
from megatron_rpp.checkpoint.rng import restore_rng
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.sharded import load_checkpoint
from megatron_rpp.config.deadlines import longest_wait_s, phase_deadline_s
from megatron_rpp.config.job import Resume
from megatron_rpp.config.load import dump_toml
from megatron_rpp.config.schema import Config
from megatron_rpp.config.sources import held_out_sources, training_sources
from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.data.prompts import load_eval_prompts, load_training_prompts
from megatron_rpp.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_rpp.device.memory import prepare_allocator
from megatron_rpp.engine.advantages import ShapingState
from megatron_rpp.engine.offload import Offload
from megatron_rpp.engine.optimizer import Optimizer, make_trainable
from megatron_rpp.engine.score import uses_fused_logprobs
from megatron_rpp.experience.types import Prompt
from megatron_rpp.model.build import Model, build_frozen, build_model
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.observability.memory import PhaseMemory
from megatron_rpp.observability.profiler import Profiler
from megatron_rpp.observability.reporter import Reporter
from megatron_rpp.observability.timers import Timers
from megatron_rpp.parallel import bootstrap, stop_request
from megatron_rpp.parallel.collectives import gather_objects, on_rank_0
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.parallel.watchdog import Watchdog
from megatron_rpp.parity.monitor import ParityMonitor
from megatron_rpp.parity.run_parts import RunParts
from megatron_rpp.reward.build import build_reward
from megatron_rpp.reward.protocol import Reward
from megatron_rpp.reward.verdicts import verdict_only
from megatron_rpp.rollout import journal
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.registry import Registry
from megatron_rpp.rollout.reward_reach import open_reward_services
from megatron_rpp.rollout.schedule.quota import quota_of
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
    offload: Offload
    rollout_engine: SyncedRolloutEngine
    parity: ParityMonitor
    checkpointer: Checkpointer
    reporter: Reporter
    first_step: int
    shaping: ShapingState
    timers: Timers
    memory: PhaseMemory
    profiler: Profiler
    watchdog: Watchdog

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of a step: timed as time/`name`, its memory noted, named in a profile, and watched."""
        watched = self.watchdog.phase(name, phase_deadline_s(self.config, name))
        with self.timers(name), self.memory(name), self.profiler.phase(name), watched:
            yield

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

    def is_asked_to_stop(self) -> bool:
        """Whether any rank was asked to save and stop; the same on all. A collective over the whole job."""
        return any(gather_objects(stop_request.is_requested()))

    def greedy(self) -> SamplingParams:
        """One greedy response a prompt."""
        return replace(self.sampling(0), num_samples_per_prompt=1, temperature=0.0)

    def save(self, step: int, *, wait: bool = False, replace: bool = False) -> None:
        """Write the checkpoint of the state after `step` rollout batches. A collective over the whole job.

        wait: return when it is whole; otherwise checkpoint.background says. replace: one of that step, too.
        """
        state = RunState(
            step=step,
            prompts=self.prompt_source.state_dict(),
            schedule=self.optimizer.schedule.state_dict(),
            shaping=asdict(self.shaping),
            parity=self.parity.state_dict(),
            layout=asdict(self.config.parallel),
        )
        if self.offload.moves_optimizer:
            self.rollout_engine.release_memory()  # which would leave no room for it; the next sampling syncs anew
        with self.offload.saving():
            self.checkpointer.save(self.policy, self.optimizer, state, self.reference, wait=wait, replace=replace)


@contextmanager
def open_session(config: Config, *, resume: Resume) -> Iterator[Session]:
    """Build a run, user errors first and servers early; stop what was started, however the run ends.

    resume: "auto" goes on from a checkpoint where there is one, and starts otherwise.

    Raises ValueError for what only the data, the tokenizer or the ranks can tell.
    """
    graphs, wait_s = config.train.cuda_graphs, longest_wait_s(config)
    parallel = bootstrap.initialize(config.parallel, config.run.seed, wait_s, config.run.dir, graph_generators=graphs)
    start_s = phase_deadline_s(config, "sync")  # servers are waited for, and synced
    watchdog = Watchdog(parallel.store, parallel.place, config.run.dir, config.watchdog, start_s)
    # Other ranks are told of an error before the teardown, and the watchdog outlives it.
    with watchdog, ExitStack() as stack, watchdog.telling():
        stack.callback(bootstrap.shutdown)
        profiler = Profiler(config.profile, config.run.dir, parallel.rank)
        uses_fused_logprobs(config.train.fused_logprobs)  # or it cannot be
        tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
        hf = read_hf_config(config.model.path)
        check_vocabulary(tokenizer, hf.vocab_size, config.model.path)
        check_weight_sync(config, hf)
        prepare_allocator(config, os.environ)
        prompt_source, eval_prompts = _prompt_source(config, tokenizer), load_eval_prompts(config, tokenizer)
        services = stack.enter_context(open_reward_services(config, parallel))
        reward = build_reward(config.reward, training_sources(config.data), services.model_urls)
        stack.callback(reward.close)
        eval_reward = build_reward(verdict_only(config.reward), held_out_sources(config), services.model_urls)
        stack.callback(eval_reward.close)
        client = SGLangClient((), config.rollout, tokenizer.decode)
        fleet = ServerFleet(config, _registry(config, parallel)) if parallel.rank == 0 else None
        if fleet is not None:
            stack.callback(fleet.stop)
        policy, optimizer = make_trainable(
            build_model(config, parallel, path=config.model.path), config.optimizer, total_optimizer_steps(config)
        )
        reference = build_frozen(config, parallel, path=config.model.path) if config.algorithm.uses_reference else None
        logger.info("preset %s, estimator %s", config.algorithm.preset, config.algorithm.estimator)
        checkpointer = stack.enter_context(_checkpointer(config, parallel))
        state = _resume(config, resume, policy, optimizer, reference, prompt_source)
        first_step, shaping = state.step, ShapingState.from_dict(state.shaping)
        offload = Offload(config.memory, policy, optimizer, reference)
        offload.put_away()  # the first sync and the first sampling need the room
        engine = build_engine(config, policy, fleet, client, _journal(config, parallel, resume, first_step))
        stack.callback(engine.close)
        services.wait_ready()
        engine.wait_ready()
        engine.sync(first_step)
        parity = ParityMonitor(RunParts(config, policy, engine, client, tokenizer))
        parity.load_state_dict(state.parity)
        checkpointer.check_fence()  # from here on metrics.jsonl is written
        replica = parallel.dp_rank if parallel.is_replica_leader else None
        reporter = stack.enter_context(
            Reporter(config.run.dir, rank=parallel.rank, replica=replica, steps=range(first_step, config.run.steps))
        )
        if parallel.rank == 0:
            (Path(config.run.dir) / "config.toml").write_text(dump_toml(config))
        yield Session(
            config, parallel, tokenizer, prompt_source, eval_prompts, reward, eval_reward, policy, reference,
            optimizer, offload, engine, parity, checkpointer, reporter, first_step, shaping, Timers(), PhaseMemory(),
            profiler, watchdog,
        )  # fmt: skip


def total_optimizer_steps(config: Config) -> int:
    """Optimizer steps of the whole run, for the learning-rate schedule."""
    responses = config.rollout.num_prompts * config.algorithm.num_samples_per_prompt
    return config.run.steps * (responses // config.train.batch_size)


def _registry(config: Config, parallel: ParallelContext) -> Registry | None:
    """Where servers announce themselves to this job; None where it does not want that."""
    if not config.rollout.registry:
        return None
    return Registry(parallel.store, parallel.place.attempt, config.rollout.health_deadline_s)


def _prompt_source(config: Config, tokenizer: Tokenizer) -> PromptSource:
    """The training prompts, mixed and ordered."""
    return PromptSource(
        load_training_prompts(config, tokenizer),
        config.rollout.num_prompts,
        config.run.seed,
        weights={name: source.weight for name, source in config.data.sources.items()},
        curriculum=config.data.curriculum,
        most_drawn=quota_of(config).draws,
    )


@contextmanager
def _checkpointer(config: Config, parallel: ParallelContext) -> Iterator[Checkpointer]:
    """Claims run.dir for this start of the job. What is in the making at the end becomes whole."""
    fence = None
    if parallel.rank == 0:
        fence = Fence(config.run.dir, parallel.place.attempt)
        fence.claim()
    keeps_all = config.rollout.record == "all"
    forget_sampled = None if keeps_all else partial(journal.forget, config.run.dir)
    checkpointer = Checkpointer(
        config.run.dir, config.model.path, config.checkpoint, fence=fence, on_whole=forget_sampled
    )
    try:
        yield checkpointer
    except BaseException:
        checkpointer.abandon()
        raise
    checkpointer.wait()


def _resume(
    config: Config,
    resume: Resume,
    policy: Model,
    optimizer: Optimizer,
    reference: Model | None,
    prompt_source: PromptSource,
) -> RunState:
    """Load the newest whole checkpoint, with this rank's generators. The state of a new run where there is none."""
    path = find_checkpoint(config.run.dir, verify=config.checkpoint.verify) if resume != "no" else None
    if path is None:
        if resume == "yes":
            raise ValueError(f"--resume: run.dir={config.run.dir} holds no complete checkpoint; start without --resume")
        return RunState(0, prompt_source.state_dict(), {})
    state = load_checkpoint(path, policy, optimizer, reference)
    prompt_source.load_state_dict(state.prompts)
    restore_rng(path, is_same_layout=state.layout == asdict(config.parallel), seed=config.run.seed, step=state.step)
    logger.info("resumed from %s", path)
    return state


def _journal(config: Config, parallel: ParallelContext, resume: Resume, first_step: int) -> journal.Journal | None:
    """This rank's, after rank 0 has deleted what no step will ask for. A collective over the whole job."""

    def tidy() -> None:
        if resume == "no":
            journal.forget(config.run.dir)
        elif config.rollout.record != "all":
            journal.forget(config.run.dir, before=first_step)

    on_rank_0(tidy)
    return journal.open_journal(config, parallel)
