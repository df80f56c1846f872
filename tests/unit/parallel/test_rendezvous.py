"""How ranks find the store, with a thread a rank; and a roll call of ranks that do not fit together."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.parallel import interfaces, rendezvous
from megatron_rpp.parallel.environment import JobPlace
from megatron_rpp.parallel.exchange import Exchange
from megatron_rpp.parallel.rendezvous import open_store
from megatron_rpp.parallel.rendezvous_file import Rendezvous, newest_rendezvous, rendezvous_of, withdraw, write
from megatron_rpp.parallel.roll_call import Presence, check_presence

SOON = timedelta(seconds=20)


@pytest.fixture(autouse=True)
def leave() -> Iterator[None]:
    yield
    withdraw()


def places(attempt: str, size: int = 2, hosts: Sequence[str] = ("a",)) -> list[JobPlace]:
    """Ranks dealt out to hosts in blocks, as srun tells them."""
    each = size // len(hosts)
    return [JobPlace(rank, size, rank % each, each, "slurm", attempt, hosts[rank // each]) for rank in range(size)]


def meet(ranks: Sequence[JobPlace], run_dir: Path, timeout: timedelta = SOON) -> list[list[str]]:
    """What the ranks of one job or several gather in their own job's store."""

    stores = []  # rank 0's must live until all have read

    def one(place: JobPlace) -> list[str]:
        store = open_store(place, str(run_dir), timeout)
        stores.append(store)
        exchange = Exchange(store, place.rank, place.world_size, "test")
        return exchange.gather("names", f"{place.attempt}/{place.rank}", timeout.total_seconds())

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_jobs_that_start_at_once_in_one_folder_keep_apart(tmp_path: Path) -> None:
    jobs = ("5.0.0", "6.0.0", "7.0.0")
    told = meet([place for job in jobs for place in places(job)], tmp_path)
    assert told == [[f"{job}/0", f"{job}/1"] for job in jobs for _ in range(2)]


def test_a_file_that_an_earlier_start_left_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "CONNECT_S", 0.5)
    earlier = open_store(replace(places("5.0.0", 1)[0], attempt="other"), str(tmp_path), SOON)  # its port lives on
    stale = replace(rendezvous_of(earlier), attempt="5.0.0")
    write(tmp_path / "rendezvous" / "5.0.0.json", vars(stale))
    first, second = places("5.0.0")
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(open_store, second, str(tmp_path), SOON)
        time.sleep(1.0)
        assert not late.done()
        store = open_store(first, str(tmp_path), SOON)
        assert rendezvous_of(late.result()) == rendezvous_of(store)


def test_a_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rank 1 on host a did not find rank 0; .*5.0.0.json is not there: run.dir"):
        open_store(places("5.0.0")[1], str(tmp_path), timedelta(seconds=0.3))


def test_thousands_of_ranks_do_not_flood_the_shared_folder_with_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 4096 ranks waits half a minute for the file, by a clock of the test's."""
    (tmp_path / "rendezvous").mkdir()
    looks, listings, now = 0, 0, 0.0

    def look(path: Path) -> None:
        nonlocal looks
        looks += 1

    def list_names(path: Path) -> list[str]:
        nonlocal listings
        listings += 1
        return []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(rendezvous, "read", look)
    monkeypatch.setattr(rendezvous.os, "listdir", list_names)
    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: now)
    monkeypatch.setattr(rendezvous.time, "sleep", sleep)
    with pytest.raises(ConfigError, match="did not find rank 0"):
        open_store(places("5.0.0", 4096, ["a", "b"])[-1], str(tmp_path), timedelta(seconds=30))
    assert 4 <= looks <= 15
    assert 1 <= listings <= 6


def test_srun_without_a_folder_is_told() -> None:
    with pytest.raises(ConfigError, match="srun's ranks meet in"):
        open_store(places("5.0.0")[0], None, SOON)


def test_the_newest_store_is_found_until_it_is_withdrawn(tmp_path: Path) -> None:
    assert newest_rendezvous(tmp_path) is None
    write(tmp_path / "rendezvous" / "1.json", vars(Rendezvous("1", "b", "127.0.0.1", 9, 1, time.time() - 9)))
    write(tmp_path / "rendezvous" / "2.json", {"attempt": "2", "error": "refused"})
    store = open_store(places("3", 1)[0], str(tmp_path), SOON)
    found = newest_rendezvous(tmp_path)
    assert found == rendezvous_of(store) and found.attempt == "3"
    store.set("word", "hello")
    assert found.connect(SOON).get("word") == b"hello"
    withdraw()
    left = newest_rendezvous(tmp_path)
    assert left is not None and left.attempt == "1"
    with pytest.raises(ConnectionError, match="no store answers at 127"):
        left.connect(timedelta(seconds=0.3))


def test_rank_0_tells_the_others_why_it_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    ranks = places("5.0.0", 2, ["a", "b"])
    message = "host a: its name localhost stands for 127.0.0.1, which other hosts cannot reach; add localhost with its"
    for place in ranks:
        with pytest.raises(ConfigError) as caught:
            open_store(place, str(tmp_path), SOON)
        assert str(caught.value).startswith(message)


def test_a_name_that_does_not_resolve_is_told_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "node9.invalid")
    with pytest.raises(ConfigError, match=r"host node9: the name node9.invalid does not resolve .* set GLOO_SOCKET_IF"):
        interfaces.reachable_address("node9")


def test_the_users_interface_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert interfaces.reachable_address("a") == "127.0.0.1"
    env = {"NCCL_SOCKET_IFNAME": "ib0"}
    own = next(address for address in interfaces.interfaces().values() if not interfaces.is_loopback(address))
    name = interfaces.choose_interfaces(own, env)
    assert env == {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": name}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME=ib7 must be an interface of host a: .*lo"):
        interfaces.reachable_address("a")


def test_a_job_on_loopback_chooses_no_interface() -> None:
    env: dict[str, str] = {}
    assert interfaces.choose_interfaces("127.0.0.1", env) is None
    assert env == {}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "head.invalid", "MASTER_PORT": "9"}, "host b: the name head.invalid does not resolve"),
        (
            {"MASTER_ADDR": "localhost", "MASTER_PORT": "9"},
            "host b: MASTER_ADDR=localhost stands for 127.0.0.1, but the",
        ),
        ({"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "x"}, "MASTER_PORT=x must be the port of rank 0's store"),
        ({"MASTER_ADDR": "192.0.2.1"}, "MASTER_PORT=0 must be the port"),
    ],
)
def test_an_address_that_cannot_be_rank_0s_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        open_store(JobPlace(2, 4, 0, 2, "torchrun", "torchrun.0", "b"), None, SOON)
    assert str(caught.value).startswith(message)


def test_a_port_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=f"host a: MASTER_PORT={port} cannot be taken"):
            open_store(JobPlace(0, 2, 0, 2, "torchrun", "torchrun.0", "a"), None, SOON)


def test_ranks_that_torchrun_starts_again_have_their_own_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = open_store(places("agent", 1)[0], None, SOON)  # its store outlives the ranks
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(rendezvous_of(agent).port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for restart in range(2):
        ranks = [JobPlace(rank, 2, rank, 2, "torchrun", f"x.{restart}", "a") for rank in range(2)]
        assert meet(ranks, tmp_path) == [[f"x.{restart}/0", f"x.{restart}/1"]] * 2
        found = newest_rendezvous(tmp_path)
        assert found is not None and found.attempt == f"x.{restart}"
        assert found.connect(SOON).get("exchange/test/1/all")  # where the ranks' own keys are


FOUR = places("5.0.0", 4, ["a", "b"])


def test_ranks_that_fit_together_pass() -> None:
    check_presence([Presence(place, f"GPU-{place.local_rank}") for place in FOUR])


@pytest.mark.parametrize(
    ("rank", "change", "gpu", "message"),
    [
        (3, {"local_rank": 0}, None, "host b has 2 of the job's ranks, but their local ranks are [0, 0] of [2]"),
        (
            3,
            {"local_world_size": 4, "local_rank": 3},
            None,
            "host b has 2 of the job's ranks, but their local ranks are",
        ),
        (2, {"host": "a"}, None, "host a has 3 of the job's ranks"),
        (
            2,
            {"attempt": "5.0.1"},
            None,
            "rank 2 on host b belongs to slurm job 5.0.1, and rank 0 on host a to slurm job",
        ),
        (1, {"launcher": "mpi"}, None, "rank 1 on host a belongs to mpi job 5.0.0, and rank 0"),
        (1, {"world_size": 8}, None, "rank 1 on host a was told of 8 ranks, and rank 0 on host a of 4"),
        (1, {}, "GPU-0", "host a: 2 ranks share 1 GPUs"),
    ],
)
def test_ranks_that_do_not_fit_together_are_told(
    rank: int, change: dict[str, object], gpu: str | None, message: str
) -> None:
    everyone = [Presence(place, None if gpu is None else f"GPU-{place.local_rank}") for place in FOUR]
    everyone[rank] = Presence(replace(FOUR[rank], **change), gpu)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        check_presence(everyone)
    assert str(caught.value).startswith(message)


def test_the_file_can_be_read_without_this_package(tmp_path: Path) -> None:
    store = open_store(places("3", 1)[0], str(tmp_path), SOON)
    content = json.loads((tmp_path / "rendezvous" / "3.json").read_text())
    assert content.keys() >= {"attempt", "host", "address", "port", "world_size", "time"}
    assert content["port"] == rendezvous_of(store).port
