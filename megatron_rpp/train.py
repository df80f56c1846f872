"""The REINFORCE++ loop.

prompts -> rollout (SGLang) -> reward -> balance -> collate -> score (policy and reference log-probs)
        -> advantages (global) -> train step(s) -> weight sync -> next prompts
"""

from __future__ import annotations

from megatron_rpp.collect import collect
from megatron_rpp.config.job import Resume
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.advantages import add_advantages
from megatron_rpp.engine.balance import ReplicaShare, balance
from megatron_rpp.engine.score import score
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.evaluate import evaluate
from megatron_rpp.experience.collate import collate
from megatron_rpp.greedy_baseline import greedy_rewards
from megatron_rpp.parallel.collectives import from_replica_leader
from megatron_rpp.parallel.exit_codes import STOPPED
from megatron_rpp.parallel.own_failure import training_begins
from megatron_rpp.session import Session, open_session
from megatron_rpp.step_metrics import step_metrics


def run(config: Config, *, resume: Resume) -> int:
    """Train the policy of `config`, from its start or from its newest checkpoint. Every rank calls it.

    Returns the exit code: 0, or STOPPED where it was asked to save and stop before its end.
    """
    with open_session(config, resume=resume) as session:
        training_begins()
        for step in range(session.first_step, config.run.steps):
            with session.profiler.step(step):
                train_on_one_batch(session, step)
            if session.is_asked_to_stop() and step + 1 < config.run.steps:
                if not is_due(step, config.checkpoint.interval, config.run.steps):
                    session.save(step + 1)
                return STOPPED
    return 0


def train_on_one_batch(s: Session, step: int) -> None:
    """One turn of the loop: sample with policy version `step`, leave version `step + 1` on the servers."""
    evals = evaluate(s) if step == 0 else {}
    s.checkpointer.poll()
    with s.timers("step"):
        with s.phase("rollout"):
            collected = collect(s, step)
        rollouts, rewards = collected.rollouts, collected.rewards
        if rewards is None:
            with s.phase("reward"):
                rewards = from_replica_leader(s.parallel, lambda: s.reward(rollouts))
        baselines = greedy_rewards(s, rollouts)
        with s.phase("parity"):
            s.parity.ask_while_awake(rollouts)
        s.rollout_engine.release_memory()
        with s.phase("balance"):
            sampled = ReplicaShare(rollouts, rewards, baselines)
            share, balance_stats = balance(sampled, s.config, s.policy.hf, s.parallel)
        batch = collate(
            share.rollouts,
            share.rewards,
            share.greedy_rewards,
            minibatch_ids=share.minibatch_ids,
            pad_token_id=s.tokenizer.pad_token_id,
            device=s.parallel.device,
        )
        with s.phase("score"), s.offload.scoring():
            batch = score(batch, s.policy, s.reference, s.config)
        with s.phase("parity"):
            parity = s.parity.check(step, batch, share.rollouts)
        batch, s.shaping, advantage_stats = add_advantages(batch, s.config, s.parallel, s.shaping)
        with s.phase("train"), s.offload.training():
            train_stats = train_step(s.policy, s.optimizer, batch, parity.config)
        with s.phase("sync"):
            s.rollout_engine.sync(policy_version=step + 1)
    if is_due(step, s.config.eval.interval, s.config.run.steps):
        evals = evals or evaluate(s)
    known = {**collected.metrics, **balance_stats, **parity.metrics, **advantage_stats, **train_stats, **evals}
    metrics = step_metrics(s, batch, share.rollouts, known)
    s.checkpointer.check_fence()
    s.reporter.step(step, metrics, share.rollouts, share.rewards, collected.skipped)
    if is_due(step, s.config.checkpoint.interval, s.config.run.steps):
        s.save(step + 1)  # after its metrics, which a resumed run does not write again


def is_due(step: int, interval: int, steps: int) -> bool:
    """Whether something done every `interval` steps, and after the last, is due after `step`. 0: never."""
    return interval > 0 and ((step + 1) % interval == 0 or step + 1 == steps)
