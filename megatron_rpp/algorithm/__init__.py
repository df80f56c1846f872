"""The REINFORCE++ objective as pure tensor math: no process groups, no Megatron."""

from megatron_rpp.algorithm.advantages import compute_advantages
from megatron_rpp.algorithm.kl import kl_estimate
from megatron_rpp.algorithm.loss import policy_loss

__all__ = ["compute_advantages", "kl_estimate", "policy_loss"]
