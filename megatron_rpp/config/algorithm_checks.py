"""Settings of the objective that contradict one another, or that nothing would read."""

from __future__ import annotations

from megatron_rpp.config.algorithm import AlgorithmConfig
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.presets import GROUP_ESTIMATORS
from megatron_rpp.config.schema import Config


def check_algorithm(config: Config) -> None:
    """Raises ConfigError for the first combination of `[algorithm]` and `[reward]` that cannot be meant."""
    _check_groups(config)
    _check_kl(config.algorithm)
    _check_returns(config.algorithm)
    _check_shaping(config)


def _check_groups(config: Config) -> None:
    samples, estimator = config.algorithm.num_samples_per_prompt, config.algorithm.estimator
    if samples >= 2:
        return
    if estimator in GROUP_ESTIMATORS:
        raise ConfigError(
            f"algorithm.num_samples_per_prompt={samples} must be at least 2 for algorithm.estimator={estimator}, "
            "whose baseline is the other responses to a prompt"
        )
    if config.reward.normalization == "group":
        raise ConfigError(
            f"algorithm.num_samples_per_prompt={samples} must be at least 2 for reward.normalization=group"
        )


def _check_kl(algorithm: AlgorithmConfig) -> None:
    if algorithm.kl_placement == "none" and algorithm.kl_coef:
        raise ConfigError(
            f"algorithm.kl_coef={algorithm.kl_coef} has no effect with algorithm.kl_placement=none; set "
            "algorithm.kl_loss_coef for a KL loss, or algorithm.kl_placement for a KL in the reward"
        )
    if algorithm.kl_target and not algorithm.kl_coef:
        raise ConfigError(
            f"algorithm.kl_target={algorithm.kl_target} must go with algorithm.kl_coef above 0, its start value"
        )


def _check_returns(algorithm: AlgorithmConfig) -> None:
    estimator, placement = algorithm.estimator, algorithm.kl_placement
    if algorithm.gamma != 1 and (estimator != "reinforce_pp" or placement == "instant"):
        raise ConfigError(
            f"algorithm.gamma={algorithm.gamma} must be 1 for algorithm.estimator={estimator} with "
            f"algorithm.kl_placement={placement}: a response's score is given to each of its tokens"
        )
    if algorithm.loss_constant and algorithm.loss_aggregation != "constant":
        raise ConfigError(
            f"algorithm.loss_constant={algorithm.loss_constant} must go with algorithm.loss_aggregation=constant"
        )


def _check_shaping(config: Config) -> None:
    reward, longest = config.reward, config.rollout.max_response_tokens
    if reward.overlong_buffer_tokens > longest:
        raise ConfigError(
            f"reward.overlong_buffer_tokens={reward.overlong_buffer_tokens} must be at most "
            f"rollout.max_response_tokens={longest}"
        )
    if config.algorithm.estimator == "remax" and (reward.overlong_buffer_tokens or reward.normalization != "none"):
        raise ConfigError(
            "algorithm.estimator=remax must go with reward.overlong_buffer_tokens=0 and reward.normalization=none: "
            "its greedy baseline is a reward as it comes"
        )
