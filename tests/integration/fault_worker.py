"""One rank of a job in which syncs are disturbed; what came of each is written to result.json."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import Tensor

from megatron_rpp.config.load import load_config
from megatron_rpp.config.schema import Config
from megatron_rpp.observability.logs import setup_logging
from megatron_rpp.parallel.rank_process import exit_on_sigterm
from megatron_rpp.rollout import control
from megatron_rpp.rollout.http import get_json
from megatron_rpp.session import Session, open_session
from megatron_rpp.train import train_on_one_batch
from megatron_rpp.weight_sync import phases, server_group
from megatron_rpp.weight_sync.broadcast import BroadcastTransport
from megatron_rpp.weight_sync.build import build_transport
from megatron_rpp.weight_sync.checksums import ExpectedChecksums
from megatron_rpp.weight_sync.ipc import IpcTransport
from megatron_rpp.weight_sync.server_group import ServerGroup
from megatron_rpp.weight_sync.transaction import Transaction
from megatron_rpp.weight_sync.transport import Transport, WeightSyncError
from tests.integration.killer import STEPS_BETWEEN, Killer
from tests.support.warned import warnings_of

BUCKET_BYTES = 16_384  # several buckets even of the tiny model


def main() -> None:
    """argv: the configuration, the folder of the results, the scenarios' names."""
    config, out = load_config([sys.argv[1]], []), Path(sys.argv[2])
    exit_on_sigterm()
    setup_logging(config.run.dir, int(os.environ.get("RANK", "0")))
    results: list[dict[str, Any]] = []
    with open_session(config, resume="no") as session:
        for transport in session.rollout_engine._transports:
            if isinstance(transport, BroadcastTransport):
                transport._bucket_bytes = BUCKET_BYTES
        for name in sys.argv[3:]:
            pids = server_pids()
            with warnings_of("megatron_rpp") as warnings:
                results.append({"fault": name, **SCENARIOS[name](session, config)})
            results[-1] |= {"warnings": warnings, "pids_before": pids, "pids": server_pids(), "run_dir": config.run.dir}
            if session.parallel.rank == 0:
                (out / "result.json").write_text(json.dumps(results))


def attempt(session: Session) -> dict[str, Any]:
    """Change the weights, sync them, sample; what came of it."""
    engine, start = session.rollout_engine, time.monotonic()
    version = engine.policy_version + 1
    for chunk in session.policy.chunks:
        for i, parameter in enumerate(chunk.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version * 1000 + i))
            parameter.data.add_(0.02 * noise.to(parameter.dtype))
    try:
        engine.sync(version)
    except WeightSyncError as error:
        kind = type(error).__name__
        return {"error": str(error), "kind": kind, "seconds": time.monotonic() - start, "version": version}
    seconds = time.monotonic() - start
    return {"version": version, "seconds": seconds, **state(session)}


def state(session: Session) -> dict[str, Any]:
    """What serves, and whether it is what the policy holds."""
    engine = session.rollout_engine
    rollouts = engine.generate(session.eval_prompts, session.greedy())
    urls = [server.url for server in engine._serving()]
    assert engine.last_sync is not None
    return {
        "transport": engine.last_sync.transport,
        "servers": len(urls),
        "answering": [get_json(url, "model_info", 30)["weight_version"] for url in urls],
        "differences": engine.verify_weights(),
        "sampled_by": sorted({rollout.policy_version for rollout in rollouts}),
        "sampled": len(rollouts),
        "asked": len(session.eval_prompts),
    }


def server_pids() -> list[int]:
    """The servers that this rank has spawned, oldest first."""
    children = sorted(psutil.Process().children(), key=lambda child: child.create_time())
    return [c.pid for c in children if "sglang.launch_server" in " ".join(c.cmdline())]


def pid_of(session: Session, index: int = 0) -> int:
    """The process group of the serving server number `index`."""
    port = session.rollout_engine._serving()[index].url.rsplit(":", 1)[1]
    (found,) = [pid for pid in server_pids() if port in psutil.Process(pid).cmdline()]
    return found


@contextmanager
def before(owner: Any, method: str, action: Callable[[], None], call: int = 1) -> Iterator[None]:
    """Run `action` right before the `call`-th call of owner.method."""
    original, calls = getattr(owner, method), 0

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return original(*args, **kwargs)

    with patch.object(owner, method, disturbed):
        yield


def kill(session: Session, signum: int = signal.SIGKILL) -> Callable[[], None]:
    if session.parallel.rank != 0:
        return lambda: None
    pid = pid_of(session)
    return lambda: os.killpg(pid, signum)


def undisturbed(session: Session, config: Config) -> dict[str, Any]:
    return attempt(session)


def by_ipc(session: Session, config: Config) -> dict[str, Any]:
    """Without a GPU its requests carry the bytes; the server reads them in the same way."""
    with transports(session, IpcTransport(bucket_bytes=BUCKET_BYTES)):
        return attempt(session)


def killed_before(session: Session, config: Config) -> dict[str, Any]:
    """After the look at who lives, before the sync's first request."""
    with before(Transaction, "_arrive", kill(session)):
        return attempt(session)


def killed_at_join(session: Session, config: Config) -> dict[str, Any]:
    """In an update session, while the other server joins a group that it belongs to."""
    with before(server_group, "_join_server", kill(session)):
        return attempt(session)


def killed_during(session: Session, config: Config) -> dict[str, Any]:
    with before(ServerGroup, "broadcast", kill(session), call=3):
        return attempt(session)


def killed_after(session: Session, config: Config) -> dict[str, Any]:
    with before(control, "end_update", kill(session)):
        return attempt(session)


def stopped_during(session: Session, config: Config) -> dict[str, Any]:
    with before(ServerGroup, "broadcast", kill(session, signal.SIGSTOP), call=3):
        return attempt(session)


def corrupted(session: Session, config: Config) -> dict[str, Any]:
    """One bit of one bucket changes on its way."""
    original, calls = ServerGroup.broadcast, 0

    def flip(self: ServerGroup, flat: Tensor, timeout_s: float) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            flat = flat.clone()
            flat.flatten().view(torch.uint8)[100] ^= 1
        return original(self, flat, timeout_s)

    with patch.object(ServerGroup, "broadcast", flip):
        return attempt(session)


def other_version(session: Session, config: Config) -> dict[str, Any]:
    """Someone else names another version on a server; then it is asked for samples."""
    control.set_version(session.rollout_engine._serving()[0].url, "77", 30)
    rollouts = session.rollout_engine.generate(session.eval_prompts, session.greedy())
    then = sorted({rollout.policy_version for rollout in rollouts})
    return {"version": session.rollout_engine.policy_version, "sampled_then": then, **state(session)}


def skewed(session: Session, config: Config) -> dict[str, Any]:
    """Someone else names another version on a server; then it is synced."""
    control.set_version(session.rollout_engine._serving()[0].url, "77", 30)
    return attempt(session)


def rejoined(session: Session, config: Config) -> dict[str, Any]:
    """All servers that died come back, are synced, and serve."""
    until_all_serve(session, config)
    return {"version": session.rollout_engine.policy_version, **state(session)}


def until_all_serve(session: Session, config: Config) -> None:
    end = time.monotonic() + 200
    while len(session.rollout_engine._serving()) < config.rollout.num_servers and time.monotonic() < end:
        session.rollout_engine._admit_newcomers()
        time.sleep(0.5)


def disk_full_then_broadcast(session: Session, config: Config) -> dict[str, Any]:
    broadcast = session.rollout_engine._transports[0]
    with transports(session, full_disk(config), broadcast):
        return attempt(session)


def disk_full_only(session: Session, config: Config) -> dict[str, Any]:
    with transports(session, full_disk(config)):
        return attempt(session)


def thirty_steps(session: Session, config: Config) -> dict[str, Any]:
    """Train while one of two servers dies at seeded random moments, and comes back, four times or more."""
    first = session.rollout_engine.policy_version
    killer = Killer(session, seed=7)
    for step in range(first, first + 90):
        if killer.wants_both and step - first >= STEPS_BETWEEN * len(killer.kills):
            until_all_serve(session, config)
        with killer.at(step):
            train_on_one_batch(session, step)
        if step - first >= 29 and killer.is_content:
            break
    return {"first": first, "kills": killer.report(), "version": session.rollout_engine.policy_version}


def full_disk(config: Config) -> Transport:
    """Writes to a file system that is too small (the test mounts it)."""
    small = str(Path(config.run.dir).parent / "disk" / "weights")
    return build_transport("disk", replace(config, weight_sync=replace(config.weight_sync, disk_path=small)))


@contextmanager
def transports(session: Session, *wanted: Transport) -> Iterator[None]:
    with patch.object(session.rollout_engine, "_transports", wanted):
        yield


def checksum_fails(session: Session, config: Config) -> dict[str, Any]:
    """An error of the leader alone, in the middle of the gathers."""

    def fail() -> None:
        raise ValueError("planted")

    with before(ExpectedChecksums, "add", fail, call=3):
        return attempt(session)


def rank_1_comes_late(session: Session, config: Config) -> dict[str, Any]:
    if session.parallel.rank == 1:
        time.sleep(config.weight_sync.deadline_s / 2)
    return attempt(session)


def rank_1_stays_away(session: Session, config: Config) -> dict[str, Any]:
    """While weights are gathered; then nothing can be tried again."""
    asleep = lambda: time.sleep(3 * config.weight_sync.deadline_s)  # noqa: E731
    with before(phases, "gather_shards", asleep if session.parallel.rank == 1 else lambda: None, call=2):
        return attempt(session)


SCENARIOS: dict[str, Callable[[Session, Config], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        undisturbed,
        by_ipc,
        killed_before,
        killed_at_join,
        killed_during,
        killed_after,
        stopped_during,
        corrupted,
        skewed,
        other_version,
        rejoined,
        disk_full_then_broadcast,
        disk_full_only,
        thirty_steps,
        checksum_fails,
        rank_1_comes_late,
        rank_1_stays_away,
    )
}


if __name__ == "__main__":
    main()
