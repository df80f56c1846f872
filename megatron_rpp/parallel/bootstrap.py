"""From a launcher's environment to process groups."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rpp import device
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.parallel.environment import JobPlace, find_job, single_place
from megatron_rpp.parallel.exchange import Exchange
from megatron_rpp.parallel.interfaces import choose_interfaces
from megatron_rpp.parallel.rendezvous import open_store
from megatron_rpp.parallel.rendezvous_file import rendezvous_of, withdraw
from megatron_rpp.parallel.roll_call import Presence, check_presence

START_TIMEOUT = timedelta(minutes=10)
"""For all ranks to be there, from when one is."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def initialize(
    config: ParallelConfig,
    seed: int,
    longest_wait_s: float = 0.0,
    run_dir: str | None = None,
    *,
    graph_generators: bool = False,
) -> ParallelContext:
    """Join the job, build Megatron's process groups and seed its generators.

    The launcher is found by its variables (environment.py); ranks that srun started meet in `run_dir`. The ranks may
    wait `longest_wait_s` for one of them (that samples, say) and a while longer before a collective gives up.
    `graph_generators`: such as can be in CUDA graphs. Raises ConfigError where the environment contradicts itself, on
    every rank that can know.
    """
    place = find_job() or single_place()
    assert place.world_size == config.world_size, "cli checks it for the user"
    device.select(place.local_rank)
    store = open_store(place, run_dir, START_TIMEOUT)
    place = _meet(place, store)
    timeout = COLLECTIVE_TIMEOUT + timedelta(seconds=longest_wait_s)
    store.set_timeout(timeout)
    dist.init_process_group(
        device.backend(), store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
    )
    return megatron_groups(config, seed, store, place, graph_generators=graph_generators)


def _meet(place: JobPlace, store: dist.Store) -> JobPlace:
    """Wait for all ranks, compare what they were told, choose the interface. Returns `place` with its final name."""
    presence = Presence(place, device.identity())
    everyone = Exchange(store, place.rank, place.world_size, "bootstrap").gather(
        "start", presence, START_TIMEOUT.total_seconds()
    )
    check_presence(everyone)
    here = rendezvous_of(store)
    choose_interfaces(here.address)
    return replace(place, attempt=here.attempt)


def megatron_groups(
    config: ParallelConfig, seed: int, store: dist.Store, place: JobPlace, *, graph_generators: bool = False
) -> ParallelContext:
    """Megatron's process groups over those of torch, and its seeded generators."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=graph_generators, force_reset_rng=True)
    return ParallelContext(
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        replica_group=_replica_group(config),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
        vpp_size=config.virtual_pipeline,
        device=device.current(),
        store=store,
        place=place,
    )


def _replica_group(config: ParallelConfig) -> dist.ProcessGroup:
    """The TP x CP x PP ranks of this rank's replica, which Megatron has no group for. A collective over the whole job.

    Megatron numbers ranks with TP innermost, then CP, DP and PP.
    """
    ranks = torch.arange(config.world_size).reshape(config.pipeline, config.data, -1)  # the last: CP x TP
    own = None
    for replica in ranks.unbind(1):
        group = dist.new_group(replica.flatten().tolist())
        own = group if dist.get_rank() in replica else own
    assert own is not None
    return own


def shutdown() -> None:
    """Leave the job: destroy Megatron's groups and torch's."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    withdraw()
