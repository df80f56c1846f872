"""The reward that a config asks for."""

from __future__ import annotations

from megatron_rpp.config.data import SourceConfig
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.reward.math_answer import MathAnswerReward
from megatron_rpp.reward.protocol import Reward
from megatron_rpp.reward.reasoning_gym import ReasoningGymReward


def build_reward(config: RewardConfig, source: SourceConfig) -> Reward:
    """The reward for prompts of `source` (data.train or data.eval).

    Raises:
        ValueError: an unknown kind, a limit that is not positive, or a verifier without its source.
    """
    if config.time_limit_s <= 0:
        raise ValueError(f"reward.time_limit_s={config.time_limit_s} must be above 0")
    if config.kind == "math_answer":
        return MathAnswerReward(config.correct, config.wrong, config.time_limit_s)
    if config.kind == "reasoning_gym":
        if source.kind != "reasoning_gym":
            raise ValueError(
                f"reward.kind=reasoning_gym needs prompts of kind reasoning_gym, not {source.kind}; "
                "use reward.kind=math_answer"
            )
        return ReasoningGymReward(source.task, source.task_args, config.correct, config.wrong, config.time_limit_s)
    raise ValueError(f"reward.kind={config.kind!r} is unknown; use math_answer or reasoning_gym")
