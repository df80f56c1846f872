"""What a session is opened with: models, prompts, rewards, servers, checkpoints, the journal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial

from megatron_rpp.checkpoint.fence import Fence
from megatron_rpp.checkpoint.find import find_checkpoint
from megatron_rpp.checkpoint.manager import Checkpointer
from megatron_rpp.checkpoint.rng import restore_rng
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.sharded import load_checkpoint
from megatron_rpp.config.job import Resume
from megatron_rpp.config.schema import Config
from megatron_rpp.config.sources import held_out_sources, training_sources
from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.data.prompts import load_training_prompts
from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.engine.optimizer import Optimizer, make_trainable
from megatron_rpp.model.build import Model, build_frozen, build_model
from megatron_rpp.parallel.collectives import on_rank_0
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.reward.build import build_reward
from megatron_rpp.reward.protocol import Reward
from megatron_rpp.reward.verdicts import verdict_only
from megatron_rpp.rollout import journal
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.registry import Registry
from megatron_rpp.rollout.schedule.quota import quota_of

logger = logging.getLogger(__name__)


def build_models(config: Config, parallel: ParallelContext) -> tuple[Model, Optimizer, Model | None]:
    """(policy, its optimizer, reference), both models with the weights of model.path; no reference without a KL."""
    path = config.model.path
    bare = build_model(config, parallel, path=path)
    policy, optimizer = make_trainable(bare, config.optimizer, total_optimizer_steps(config))
    return policy, optimizer, build_frozen(config, parallel, path=path) if config.algorithm.uses_reference else None


def total_optimizer_steps(config: Config) -> int:
    """Optimizer steps of the whole run, for the learning-rate schedule."""
    responses = config.rollout.num_prompts * config.algorithm.num_samples_per_prompt
    return config.run.steps * (responses // config.train.batch_size)


def open_rewards(
    config: Config, parallel: ParallelContext, model_urls: Sequence[str], stack: ExitStack
) -> tuple[Reward, Reward]:
    """(of training, of held-out problems: the verdict alone). `stack` closes them.

    Replica leaders alone score: they import the user's function now. Raises ValueError where that fails.
    """
    training = build_reward(config.reward, training_sources(config.data), model_urls)
    stack.callback(training.close)
    held_out = build_reward(verdict_only(config.reward), held_out_sources(config), model_urls, beside=training)
    stack.callback(held_out.close)
    if parallel.is_replica_leader:
        training.start()
        held_out.start()
    return training, held_out


def open_fleet(config: Config, parallel: ParallelContext, stack: ExitStack) -> ServerFleet | None:
    """The servers, started, on rank 0; `stack` stops them."""
    if parallel.rank > 0:
        return None
    registry = None
    if config.rollout.registry:  # where servers announce themselves to this job
        registry = Registry(parallel.store, parallel.place.attempt, config.rollout.health_deadline_s)
    fleet = ServerFleet(config, registry)
    stack.callback(fleet.stop)
    return fleet


def build_prompt_source(config: Config, tokenizer: Tokenizer) -> PromptSource:
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
def open_checkpointer(config: Config, parallel: ParallelContext) -> Iterator[Checkpointer]:
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


def resume_run(
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


def open_own_journal(
    config: Config, parallel: ParallelContext, resume: Resume, first_step: int
) -> journal.Journal | None:
    """This rank's, after rank 0 has deleted what no step will ask for. A collective over the whole job."""

    def tidy() -> None:
        if resume == "no":
            journal.forget(config.run.dir)
        elif config.rollout.record != "all":
            journal.forget(config.run.dir, before=first_step)

    on_rank_0(tidy)
    return journal.open_journal(config, parallel)
