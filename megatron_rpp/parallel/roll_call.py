"""Do all ranks of a job tell one story? Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.parallel.environment import JobPlace


@dataclass(frozen=True)
class Presence:
    """What a rank tells the others when it comes."""

    place: JobPlace
    gpu: str | None  # names it among the host's; None on CPU


def check_presence(everyone: Sequence[Presence]) -> None:
    """Raise ConfigError, the same on every rank, where the ranks' places do not make one job."""
    first = everyone[0].place
    for place in (each.place for each in everyone):
        if place.world_size != first.world_size:
            raise ConfigError(
                f"rank {place.rank} on host {place.host} was told of {place.world_size} ranks, and rank 0 on host "
                f"{first.host} of {first.world_size}; set WORLD_SIZE alike on all hosts, or let torchrun or srun set it"
            )
        if (place.launcher, place.attempt) != (first.launcher, first.attempt):
            raise ConfigError(
                f"rank {place.rank} on host {place.host} belongs to {place.launcher} job {place.attempt}, and rank 0 "
                f"on host {first.host} to {first.launcher} job {first.attempt}; start all ranks with one command"
            )
    hosts: dict[str, list[Presence]] = {}
    for each in everyone:
        hosts.setdefault(each.place.host, []).append(each)
    for host, there in hosts.items():
        _check_host(host, there)


def _check_host(host: str, there: Sequence[Presence]) -> None:
    local_ranks = sorted(each.place.local_rank for each in there)
    sizes = sorted({each.place.local_world_size for each in there})
    if local_ranks != list(range(len(there))) or sizes != [len(there)]:
        raise ConfigError(
            f"host {host} has {len(there)} of the job's ranks, but their local ranks are {local_ranks} of {sizes}; "
            "LOCAL_RANK must count a host's ranks from 0 and LOCAL_WORLD_SIZE be their number (torchrun, srun and "
            "mpirun set them), and every host needs a name of its own"
        )
    gpus = {each.gpu for each in there if each.gpu is not None}
    if gpus and len(gpus) < len(there):
        raise ConfigError(
            f"host {host}: {len(there)} ranks share {len(gpus)} GPUs; start one rank a GPU, or give each its own "
            "(srun --gpus-per-task=1)"
        )
