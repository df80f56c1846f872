"""Where this rank stands: sizes, ranks and process groups under the glossary's names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rpp.parallel.environment import JobPlace


@dataclass(frozen=True)
class ParallelContext:
    """One rank's place in the TP x CP x DP x PP grid.

    A replica is one whole copy of the model: the TP x CP x PP ranks that share a data-parallel index. Its CP ranks
    hold the same weights and the same rows, and share the tokens of each sequence. Experts
    divide the TP x CP x DP ranks of a stage otherwise, into ETP x EP x (their own data-parallel ranks); so with
    EP above 1 a replica may hold only some of them.
    """

    tp_group: ProcessGroup
    pp_group: ProcessGroup
    cp_group: ProcessGroup  # same model shard and rows, other tokens of each sequence
    dp_group: ProcessGroup  # same model shard and CP rank, other replicas
    replica_group: ProcessGroup  # TP x CP x PP
    ep_group: ProcessGroup  # the ranks that share out a layer's experts
    etp_group: ProcessGroup  # the ranks that share out each expert's rows or columns
    vpp_size: int
    device: torch.device
    store: dist.Store  # the job's; for what must not wait in a collective (parallel/exchange.py)
    place: JobPlace

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def tp_size(self) -> int:
        return self.tp_group.size()

    @property
    def tp_rank(self) -> int:
        return self.tp_group.rank()

    @property
    def pp_size(self) -> int:
        return self.pp_group.size()

    @property
    def pp_rank(self) -> int:
        return self.pp_group.rank()

    @property
    def cp_size(self) -> int:
        return self.cp_group.size()

    @property
    def cp_rank(self) -> int:
        return self.cp_group.rank()

    @property
    def dp_size(self) -> int:
        return self.dp_group.size()

    @property
    def dp_rank(self) -> int:
        return self.dp_group.rank()

    @property
    def ep_size(self) -> int:
        return self.ep_group.size()

    @property
    def etp_size(self) -> int:
        return self.etp_group.size()

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_replica_leader(self) -> bool:
        """The rank that talks to the rollout engine for its replica."""
        return self.replica_group.rank() == 0

    @property
    def is_stage_leader(self) -> bool:
        """The rank that speaks for its pipeline stage: the first of the first replica's."""
        return self.tp_rank == 0 and self.cp_rank == 0 and self.dp_rank == 0
