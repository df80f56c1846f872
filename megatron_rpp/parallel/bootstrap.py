"""From a launcher's environment to process groups: torchrun's variables, or our local launcher's."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from megatron_rpp import device
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.parallel.context import ParallelContext

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def initialize(config: ParallelConfig, seed: int, longest_wait_s: float = 0.0) -> ParallelContext:
    """Join the job, build Megatron's process groups and seed its generators.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; the local launcher also passes its listening
    socket in RPP_MASTER_LISTEN_FD, so that no other process can take the port first. The ranks may wait
    `longest_wait_s` for one of them (that samples, say) and a while longer before a collective gives up.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    assert world_size == config.tensor * config.pipeline * config.data, "cli checks it for the user"
    timeout = COLLECTIVE_TIMEOUT + timedelta(seconds=longest_wait_s)
    device.select()
    store = _store(rank, world_size)
    dist.init_process_group(device.backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    return _megatron_groups(config, seed, store)


def _store(rank: int, world_size: int) -> dist.TCPStore:
    listen_fd = os.environ.get("RPP_MASTER_LISTEN_FD") if rank == 0 else None
    return dist.TCPStore(
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ.get("MASTER_PORT", "0")),
        world_size,
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        master_listen_fd=int(listen_fd) if listen_fd else None,
        timeout=COLLECTIVE_TIMEOUT,
    )


def _megatron_groups(config: ParallelConfig, seed: int, store: dist.Store) -> ParallelContext:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ParallelContext(
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        replica_group=parallel_state.get_model_parallel_group(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
        vpp_size=config.virtual_pipeline,
        device=device.current(),
        store=store,
    )


def shutdown() -> None:
    """Leave the job: destroy Megatron's groups and torch's."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
