"""The objective as pure tensor math: no process groups, no Megatron."""

from megatron_rpp.algorithm.advantages import compute_advantages
from megatron_rpp.algorithm.kl import kl_estimate, reward_kl
from megatron_rpp.algorithm.loss import PolicyLoss, policy_loss

__all__ = ["PolicyLoss", "compute_advantages", "kl_estimate", "policy_loss", "reward_kl"]
