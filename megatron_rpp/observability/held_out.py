"""The held-out sets in a run's metrics: eval/NAME/accuracy. In older runs eval/accuracy is of one without a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_NUMBERS = ("accuracy", "reward")


def set_names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The sets that any of the records has an accuracy or a reward of, in the order of their coming; "" is unnamed."""
    found = (_set_name(key) for record in records for key in record)
    return list(dict.fromkeys(name for name in found if name is not None))


def mean_accuracy(metrics: Mapping[str, float]) -> float | None:
    """The accuracy at the sampling temperature: of the unnamed set, else the mean over all sets; None without any."""
    if "eval/accuracy" in metrics:
        return metrics["eval/accuracy"]
    found = [metrics[f"eval/{name}/accuracy"] for name in set_names([metrics]) if f"eval/{name}/accuracy" in metrics]
    return sum(found) / len(found) if found else None


def _set_name(key: str) -> str | None:
    section, _, rest = key.partition("/")
    name, _, number = rest.rpartition("/")
    return name if section == "eval" and number in _NUMBERS else None
