"""One job of ranks that takes one layout after another."""

from __future__ import annotations

import gc

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import PrefixStore, distributed_c10d

from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext


def take_layout(name: str, layout: ParallelConfig, first: ParallelContext | None) -> ParallelContext:
    """Megatron's groups of `layout`, with a store that no other name has. first: what the first call gave, or None.

    The groups of the layout before are destroyed. Megatron only forgets them, and each keeps three threads of gloo's
    that wake up all the time: after thirty layouts the machine does nothing else.
    """
    if first is None:
        return bootstrap.initialize(layout, seed=0)
    parallel_state.destroy_model_parallel()
    dist.barrier()  # nobody is in a collective of theirs
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()  # models and optimizers that hold them stand in cycles
    return bootstrap.megatron_groups(layout, 0, PrefixStore(name, first.store), first.place)
