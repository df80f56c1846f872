"""A layout in messages: by its keys, and in short. Context parallelism is named where there is any."""

from __future__ import annotations

from megatron_rpp.config.schema import ParallelConfig


def by_keys(parallel: ParallelConfig, *names: str) -> str:
    """parallel.tensor=2 x parallel.pipeline=1 x parallel.data=4; or of `names` only."""
    sizes = {name: getattr(parallel, name) for name in names or ("tensor", "pipeline", "context", "data")}
    return " x ".join(f"parallel.{name}={size}" for name, size in sizes.items() if size > 1 or name != "context")


def in_short(parallel: ParallelConfig) -> str:
    """TP 2 x PP 1 x DP 4."""
    context = f" x CP {parallel.context}" if parallel.context > 1 else ""
    return f"TP {parallel.tensor} x PP {parallel.pipeline}{context} x DP {parallel.data}"
