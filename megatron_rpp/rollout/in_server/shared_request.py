"""One copy of a request's tensors for all TP ranks of a server: the first has them, the others get them from it.

SGLang hands each rank an entry of its own, which would have a trainer send everything once a rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Named = Sequence[tuple[str, Tensor]]


def shared(named: Named, names: Sequence[str], group: ProcessGroup, device: torch.device) -> Named:
    """The first rank's tensors of `names`, all uint8 [n], on every rank of `group` (gloo). A collective over it.

    device: where this rank wants them.

    Where the first rank's `named` are others, it gets those back and the rest nothing: all of them can complain.
    """
    if dist.get_world_size(group) == 1:
        return named
    is_first, source = dist.get_rank(group) == 0, dist.get_global_rank(group, 0)
    given = dict(named) if is_first else {}
    sizes = torch.full((len(names),), -1, dtype=torch.int64)
    if given.keys() == set(names):
        sizes = torch.tensor([given[name].numel() for name in names])
    dist.broadcast(sizes, source, group)
    if sizes.min() < 0:
        return named if is_first else ()
    found = []
    for name, size in zip(names, sizes.tolist(), strict=True):
        tensor = given[name].cpu().contiguous() if is_first else torch.empty(size, dtype=torch.uint8)
        dist.broadcast(tensor, source, group)
        found.append((name, tensor.to(device)))
    return found


def tensor_parallel_group() -> ProcessGroup:
    """The server's TP ranks, over gloo."""
    from sglang.srt.distributed import get_tp_group

    group: ProcessGroup = get_tp_group().cpu_group
    return group
