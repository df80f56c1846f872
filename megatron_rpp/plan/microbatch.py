"""The largest microbatch that a run may meet, as one rank holds it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpp.config.schema import Config
from megatron_rpp.experience.packing import PackingRule


@dataclass(frozen=True)
class MicrobatchShape:
    """Rows of a length; or, packed, slots that begin and end at `bounds` among the tokens of all CP ranks."""

    rows: int  # packed: 1
    length: int  # that the model is given on each CP rank
    bounds: tuple[int, ...] = ()  # cu_seqlens; empty where rows are padded

    @property
    def tokens(self) -> int:
        """On each CP rank."""
        return self.rows * self.length

    @property
    def all_tokens(self) -> int:
        """On all CP ranks together: the loss sees them on each."""
        return self.bounds[-1] if self.bounds else self.tokens


def largest_microbatch(config: Config) -> MicrobatchShape:
    """Of responses that are all as long as they may be."""
    rule = _packing_rule(config)
    if not rule.budget:
        length = config.rollout.context_length
        return MicrobatchShape(config.train.micro_batch_size, -(-length // rule.unit) * rule.unit)
    slot, total = _slot(config, rule), -(-rule.budget // rule.total_multiple) * rule.total_multiple
    total = max(total, -(-slot // rule.total_multiple) * rule.total_multiple)
    bounds = [*range(0, total + 1, slot)]
    if bounds[-1] < total:
        bounds.append(total)
    return MicrobatchShape(1, total // rule.cp_size, tuple(bounds))


def num_microbatches(config: Config) -> int:
    """Of one replica in one optimizer step; packed: of such responses."""
    rule, rows = _packing_rule(config), -(-config.train.batch_size // config.parallel.data)
    each = max(1, rule.budget // _slot(config, rule)) if rule.budget else config.train.micro_batch_size
    return -(-rows // each)


def _packing_rule(config: Config) -> PackingRule:
    """As `engine.microbatches.packing_rule` makes it of a model; `unit` serves padded rows too."""
    parallel = config.parallel
    return PackingRule(
        budget=config.train.micro_batch_tokens,
        cp_size=parallel.context,
        unit=parallel.tensor if parallel.sequence else 1,
    )


def _slot(config: Config, rule: PackingRule) -> int:
    """Of a response of full length."""
    return -(-config.rollout.context_length // rule.slot_multiple) * rule.slot_multiple
