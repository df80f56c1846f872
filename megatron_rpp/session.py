"""Everything a training run needs, built once and closed once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_rpp.checkpoint.manager import Checkpointer
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config.allocator import check_allocator
from megatron_rpp.config.deadlines import longest_wait_s, phase_deadline_s, watchdog_of
from megatron_rpp.config.job import Resume
from megatron_rpp.config.load import dump_toml
from megatron_rpp.config.schema import Config
from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.data.prompts import load_eval_prompts
from megatron_rpp.data.tokenizer import Tokenizer, check_vocabulary, tokenizer_of
from megatron_rpp.engine.advantages import ShapingState
from megatron_rpp.engine.offload import Offload
from megatron_rpp.engine.optimizer import Optimizer
from megatron_rpp.engine.score import uses_fused_logprobs
from megatron_rpp.experience.types import Prompt
from megatron_rpp.model.build import Model
from megatron_rpp.model.fp8 import check_can_compute
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.layer_spec import agreed_layer_spec
from megatron_rpp.observability.memory import PhaseMemory
from megatron_rpp.observability.profiler import Profiler
from megatron_rpp.observability.reporter import Reporter
from megatron_rpp.observability.timers import Timers
from megatron_rpp.parallel import bootstrap, stop_request
from megatron_rpp.parallel.collectives import gather_objects
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.parallel.watchdog import Watchdog
from megatron_rpp.parity.monitor import ParityMonitor
from megatron_rpp.parity.run_parts import RunParts
from megatron_rpp.reward.protocol import Reward
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.reward_reach import open_reward_services
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.rollout.shared_load import SharedLoad
from megatron_rpp.session_parts import (
    build_models,
    build_prompt_source,
    open_checkpointer,
    open_fleet,
    open_own_journal,
    open_rewards,
    resume_run,
)
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

        wait: return when it is whole; otherwise checkpoint.background says. replace: one of that step, too. The next
        step's metrics have the time and the memory that it took.
        """
        with self.phase("save"):
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
    watchdog = Watchdog(parallel.store, parallel.place, config.run.dir, watchdog_of(config), start_s)
    # Other ranks are told of an error before the teardown, and the watchdog outlives it.
    with watchdog, ExitStack() as stack, watchdog.telling():
        stack.callback(bootstrap.shutdown)
        profiler = Profiler(config.profile, config.run.dir, parallel.rank)
        check_allocator(config, os.environ)
        check_can_compute(config, agreed_layer_spec(config.model.layer_spec))
        uses_fused_logprobs(config.train.fused_logprobs)  # or it cannot be
        tokenizer = tokenizer_of(config, config.model.path)
        hf = read_hf_config(config.model.path)
        check_vocabulary(tokenizer, hf.vocab_size, config.model.path)
        check_weight_sync(config, hf)
        prompt_source, eval_prompts = build_prompt_source(config, tokenizer), load_eval_prompts(config, tokenizer)
        services = stack.enter_context(open_reward_services(config, parallel))
        reward, eval_reward = open_rewards(config, parallel, services.model_urls, stack)
        client = SGLangClient((), config.rollout, tokenizer.decode)
        client.shared = SharedLoad(parallel.store) if parallel.dp_size > 1 else None
        # Servers that share the trainer's GPUs size their cache by what is free when they start.
        shares_gpus = config.rollout.release_memory
        fleet = None if shares_gpus else open_fleet(config, parallel, stack)
        policy, optimizer, reference = build_models(config, parallel)
        logger.info("preset %s, estimator %s", config.algorithm.preset, config.algorithm.estimator)
        checkpointer = stack.enter_context(open_checkpointer(config, parallel))
        state = resume_run(config, resume, policy, optimizer, reference, prompt_source)
        first_step, shaping = state.step, ShapingState.from_dict(state.shaping)
        offload = Offload(config.memory, policy, optimizer, reference)
        offload.put_away()  # the first sync and the first sampling need the room
        if shares_gpus:
            gather_objects(None)  # every rank has made room
            fleet = open_fleet(config, parallel, stack)
        engine = build_engine(config, policy, fleet, client, open_own_journal(config, parallel, resume, first_step))
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
