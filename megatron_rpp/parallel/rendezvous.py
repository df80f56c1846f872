"""How the ranks of a job find its store: rank 0 opens it on a free port, and tells the others where.

The listening socket itself is handed to the store, so that no other process can take the port in between. Where
run.dir is known, RUN_DIR/rendezvous/ATTEMPT.json tells the others of the job, too (`rpp serve`).
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.parallel.environment import JobPlace
from megatron_rpp.parallel.interfaces import LOOPBACK, is_loopback, reachable_address, resolve

POLL_S = 0.1
CONNECT_S = 10.0
"""For one try to reach the store; a file may still name one that is gone."""
_KEY = "rendezvous"
_published: list[Path] = []


@dataclass(frozen=True)
class Rendezvous:
    """Where the store of one start of a job listens."""

    attempt: str
    host: str  # rank 0's
    address: str
    port: int
    world_size: int
    time: float  # when the store was opened, in seconds since 1970
    prefix: str = ""  # of the job's keys, where the store is not the job's alone

    def connect(self, timeout: timedelta) -> dist.Store:
        """The job's store, as one more client. Raises ConnectionError where it is gone, or is another job's."""
        try:
            store = _client(self, timeout)
            found = store.get(_KEY).decode()
        except dist.DistError as error:
            raise ConnectionError(f"no store answers at {self.address}:{self.port}") from error
        if found != _packed(self):
            raise ConnectionError(f"{self.address}:{self.port} is the store of another job")
        return store


def open_store(place: JobPlace, run_dir: str | None, timeout: timedelta) -> dist.Store:
    """Meet the job's other ranks: its store, on each. They have `timeout` to come.

    `rendezvous_of` tells where it is. Raises ConfigError.
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


def rendezvous_of(store: dist.Store) -> Rendezvous:
    """Where `store`, which open_store gave, listens; and the name of this start of the job."""
    return Rendezvous(**json.loads(store.get(_KEY)))


def newest_rendezvous(run_dir: str | Path) -> Rendezvous | None:
    """The last store that a job in `run_dir` has opened; it may be gone, where that job was killed."""
    found = [each for path in _folder(run_dir).glob("*.json") if isinstance(each := _read(path), Rendezvous)]
    return max(found, key=lambda each: each.time, default=None)


def withdraw() -> None:
    """Remove the file in which this process has said where its store is."""
    while _published:
        _published.pop().unlink(missing_ok=True)


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
    store.set(_KEY, _packed(here))
    return store, here


def _open_or_tell(place: JobPlace, run_dir: str | None, timeout: timedelta) -> dist.Store:
    """On rank 0 under srun: open the store and write its file, or write there why not."""
    try:
        store, here = _open(place)
    except ConfigError as error:
        if run_dir is not None:
            _write(_path(run_dir, place.attempt), {"attempt": place.attempt, "error": str(error)})
        raise
    _publish(here, run_dir)
    store.set_timeout(timeout)
    return store


def _by_file(place: JobPlace, run_dir: Path, timeout: timedelta) -> dist.Store:
    path, deadline = _path(run_dir, place.attempt), time.monotonic() + timeout.total_seconds()
    why = f"{path} is not there: run.dir must be a folder that all nodes share"
    while time.monotonic() < deadline:
        os.listdir(path.parent) if path.parent.is_dir() else None  # has NFS look anew
        found = _read(path)
        if isinstance(found, str):
            raise ConfigError(found)
        if found is not None:
            try:
                store = found.connect(timedelta(seconds=CONNECT_S))
                store.set_timeout(timeout)
                return store
            except ConnectionError as error:
                why = f"{error}: rank 0 on host {found.host} has ended, or a firewall is between"
        time.sleep(POLL_S)
    raise ConfigError(f"rank {place.rank} on host {place.host} did not find rank 0; {why}")


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
        _publish(here, run_dir)
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
        store.set(_KEY, _packed(here))
        _publish(here, run_dir)
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
        store = _client(there, timeout)
        store.get(_KEY) if place.rank else None  # rank 0 writes it
    except dist.DistError as error:
        raise ConfigError(
            f"rank {place.rank} on host {place.host} cannot reach rank 0's store at {there.address}:{there.port} in "
            f"{timeout.total_seconds():g} s; the hosts must route to each other, without a firewall between"
        ) from error
    return store


def _client(there: Rendezvous, timeout: timedelta) -> dist.Store:
    store = dist.TCPStore(there.address, there.port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(there.prefix, store) if there.prefix else store


def _unique(place: JobPlace) -> str:
    if place.has_unique_attempt:
        return place.attempt
    return f"{place.attempt}.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}"


def _publish(here: Rendezvous, run_dir: str | None) -> None:
    if run_dir is not None:
        path = _path(run_dir, here.attempt)
        _write(path, asdict(here))
        _published.append(path)


def _packed(here: Rendezvous) -> str:
    return json.dumps(asdict(here))


def _folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "rendezvous"


def _path(run_dir: str | Path, attempt: str) -> Path:
    return _folder(run_dir) / f"{attempt}.json"


def _write(path: Path, content: dict[str, object]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part-{os.getpid()}")
    part.write_text(json.dumps(content))
    os.replace(part, path)


def _read(path: Path) -> Rendezvous | str | None:
    """The file's store, rank 0's error, or None where there is no file (any more)."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return str(content["error"]) if "error" in content else Rendezvous(**content)
