"""How the ranks of a job find its store: rank 0 opens it on a free port, and tells the others where.

The listening socket itself is handed to the store, so that no other process can take the port in between. Where
run.dir is known, RUN_DIR/rendezvous/ATTEMPT.json tells the others of the job, too (`rpp serve`).
"""

from __future__ import annotations

import os
import random
import socket
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.parallel.environment import JobPlace
from megatron_rpp.parallel.interfaces import LOOPBACK, is_loopback, reachable_address, resolve
from megatron_rpp.parallel.rendezvous_file import KEY, Rendezvous, file_of, publish, publish_error, read

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Between two looks for rank 0's file, in a small job and in a large one."""
READS_PER_S = 500
"""About so many looks of all ranks together does the job ask of the shared file system."""
LISTING_S = 5.0
CONNECT_S = 10.0
"""For one try to reach the store; a file may still name one that is gone."""


def open_store(place: JobPlace, run_dir: str | None, timeout: timedelta) -> dist.Store:
    """Meet the job's other ranks: its store, on each. They have `timeout` to come.

    `rendezvous_of` (rendezvous_file.py) tells where it is. Raises ConfigError.
    """
    if place.launcher in ("rpp", "torchrun"):
        return _by_variables(place, run_dir, timeout)
    if place.launcher == "mpi":
        return _by_broadcast(place, run_dir, timeout)
    if place.world_size > 1 and run_dir is None:
        raise ConfigError("srun's ranks meet in run.dir, which this program does not have; use torchrun or mpirun")
    if place.rank == 0:
        return _open_or_tell(place, run_dir, timeout)
    return _by_file(place, Path(str(run_dir)), timeout)


def _open(place: JobPlace) -> tuple[dist.Store, Rendezvous]:
    """On rank 0, its own store; for other hosts too, where this one has an address for them. Raises ConfigError."""
    try:
        address = LOOPBACK if place.launcher == "single" else reachable_address(place.host)
    except ConfigError:
        if place.local_world_size < place.world_size:
            raise
        address = LOOPBACK
    listener = socket.create_server((LOOPBACK if is_loopback(address) else "", 0), backlog=2 * place.world_size + 64)
    here = Rendezvous(_unique(place), place.host, address, listener.getsockname()[1], place.world_size, time.time())
    store = dist.TCPStore(
        LOOPBACK, here.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    store.set(KEY, here.packed())
    return store, here


def _open_or_tell(place: JobPlace, run_dir: str | None, timeout: timedelta) -> dist.Store:
    """On rank 0 under srun: open the store and write its file, or write there why not."""
    try:
        store, here = _open(place)
    except ConfigError as error:
        if run_dir is not None:
            publish_error(run_dir, place.attempt, str(error))
        raise
    publish(here, run_dir)
    store.set_timeout(timeout)
    return store


def _by_file(place: JobPlace, run_dir: Path, timeout: timedelta) -> dist.Store:
    path, now = file_of(run_dir, place.attempt), time.monotonic()
    deadline, listed = now + timeout.total_seconds(), now
    why = f"{path} is not there: run.dir must be a folder that all nodes share"
    while now < deadline:
        found = read(path)
        if isinstance(found, str):
            raise ConfigError(found)
        if found is not None:
            try:
                store = found.connect(timedelta(seconds=CONNECT_S))
                store.set_timeout(timeout)
                return store
            except ConnectionError as error:
                why = f"{error}: rank 0 on host {found.host} has ended, or a firewall is between"
        elif now - listed > LISTING_S and path.parent.is_dir():
            os.listdir(path.parent)  # has NFS look anew for a name that it has not found before
            listed = now
        time.sleep(min(_pause_s(place.world_size), max(0.0, deadline - now)))
        now = time.monotonic()
    raise ConfigError(f"rank {place.rank} on host {place.host} did not find rank 0; {why}")


def _pause_s(world_size: int) -> float:
    """Between two looks for the file; the ranks must not come all at once."""
    return random.uniform(0.5, 1.5) * min(max(world_size / READS_PER_S, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)


def _by_broadcast(place: JobPlace, run_dir: str | None, timeout: timedelta) -> dist.Store:
    """MPI is used for this alone. Its world is asserted first: a wrong library gives each rank a world of its own."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no libmpi
        raise ConfigError(
            f"host {place.host}: mpirun needs mpi4py and an MPI library ({error}); or use srun"
        ) from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (place.rank, place.world_size):
        raise ConfigError(
            f"host {place.host}: the launcher started rank {place.rank} of {place.world_size}, and MPI says rank "
            f"{world.rank} of {world.size}: mpi4py's MPI library is not the launcher's; use the mpirun of that "
            "library, or srun --mpi=none"
        )
    if place.rank == 0:
        try:
            store, here = _open(place)
        except ConfigError as error:
            world.bcast(error)
            raise
        world.bcast(here)
        publish(here, run_dir)
        store.set_timeout(timeout)
        return store
    told = world.bcast(None)
    if isinstance(told, ConfigError):
        raise told
    return _reach(told, place, timeout)


def _by_variables(place: JobPlace, run_dir: str | None, timeout: timedelta) -> dist.Store:
    """MASTER_ADDR and MASTER_PORT; torchrun may have opened the store there, or our launcher the socket."""
    name, port = os.environ.get("MASTER_ADDR", LOOPBACK), os.environ.get("MASTER_PORT", "0")
    if not port.isdigit() or (port == "0" and place.world_size > 1):
        raise ConfigError(f"MASTER_PORT={port} must be the port of rank 0's store; torchrun sets it")
    advice = "set MASTER_ADDR (torchrun --master-addr, --rdzv-endpoint) to a name that every node knows, or an address"
    address = resolve(name, place.host, advice)
    if is_loopback(address) and place.local_world_size < place.world_size:
        raise ConfigError(
            f"host {place.host}: MASTER_ADDR={name} stands for {address}, but the job has others; {advice}"
        )
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    prefix = place.attempt if is_shared else ""  # torchrun keeps its store when it starts the ranks again
    here = Rendezvous(_unique(place), place.host, address, int(port), place.world_size, time.time(), prefix)
    if place.rank or is_shared:
        store = _reach(here, place, timeout)
    else:
        store, here = _open_as_told(here)
    if place.rank == 0:
        store.set(KEY, here.packed())
        publish(here, run_dir)
    store.set_timeout(timeout)
    return store


def _open_as_told(here: Rendezvous) -> tuple[dist.Store, Rendezvous]:
    text = os.environ.get("RPP_MASTER_LISTEN_FD")
    listen_fd = int(text) if text else None
    try:
        store = dist.TCPStore(
            here.address, here.port, is_master=True, wait_for_workers=False, master_listen_fd=listen_fd
        )
    except dist.DistError as error:
        message = f"host {here.host}: MASTER_PORT={here.port} cannot be taken ({error}); choose another"
        raise ConfigError(message) from error
    return store, replace(here, port=store.port)


def _reach(there: Rendezvous, place: JobPlace, timeout: timedelta) -> dist.Store:
    try:
        store = there.client(timeout)
        store.get(KEY) if place.rank else None  # rank 0 writes it
    except dist.DistError as error:
        raise ConfigError(
            f"rank {place.rank} on host {place.host} cannot reach rank 0's store at {there.address}:{there.port} in "
            f"{timeout.total_seconds():g} s; the hosts must route to each other, without a firewall between"
        ) from error
    return store


def _unique(place: JobPlace) -> str:
    if place.has_unique_attempt:
        return place.attempt
    return f"{place.attempt}.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}"
