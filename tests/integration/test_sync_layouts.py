"""After a sync, whatever the trainer's layout, SGLang servers at TP 1 and TP 2 hold its weights bit for bit.

The measure is what they hold once they have loaded the same directory from disk, which nothing of ours has written.
Models of experts, which SGLang does not run on CPU: tests/distributed/test_sync_experts.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.rollout import control
from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.in_server.delta_loader import LOADER
from megatron_rpp.rollout.sglang_server import SGLangServer
from tests.integration.sync_worker import Job
from tests.support.tiny_models import SHAPE
from tests.support.weight_syncs import Make, change_a_tenth, launch, write_weights

DEADLINE_S = 60.0
Checksums = list[dict[str, str]]  # by server parameter, an entry a TP rank

LAYOUTS = {  # of four ranks: one launch for all
    "dp4": ParallelConfig(data=4),
    "tp2_dp2": ParallelConfig(tensor=2, data=2),
    "tp2_sp_pp2": ParallelConfig(tensor=2, sequence=True, pipeline=2),
    "pp2_dp2": ParallelConfig(pipeline=2, data=2),
    "pp2_vpp2_dp2": ParallelConfig(pipeline=2, virtual_pipeline=2, data=2),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "pp2_first3_dp2": ParallelConfig(pipeline=2, first_stage_layers=3, data=2),
    "tp2_cp2": ParallelConfig(tensor=2, context=2),
    "pp2_cp2": ParallelConfig(pipeline=2, context=2),
}
BY_DISK = ("tp2_pp2", "pp2_first3_dp2", "tp2_cp2")
LINK = "as-servers-see-it"
WIDE = {**SHAPE, "vocab_size": 2001, "hidden_size": 64, "head_dim": 16}  # in float32 more than a bucket of 1 MiB holds


def tied() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**WIDE, tie_word_embeddings=True))


def untied_with_biases() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**WIDE, tie_word_embeddings=False))


@dataclass(frozen=True)
class Dense:
    """The finished syncs of one model: reports of the worker, and what the servers hold after a load from disk."""

    jobs: dict[str, Job]
    reports: dict[tuple[str, int], dict[str, Any]]  # by job and version
    from_disk: dict[str, dict[str, Checksums]]  # by directory and URL


FAMILIES = {"untied_float32": (untied_with_biases, "float32"), "tied_bfloat16": (tied, "bfloat16")}


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Every sync of a trainer with float32 masters to servers of another seed's weights."""
    make, dtype = FAMILIES[request.param]
    out = tmp_path_factory.mktemp(request.param)
    with servers(write_weights(make, 99, out / "start"), dtype, out) as urls:
        jobs = dense_jobs(make, dtype, urls, out)
        launch(jobs, out)
        paths = [path for job in jobs for path in job.paths]
        from_disk = {path: {url: load_from_disk(url, path) for url in urls} for path in paths}
    steps = [(job.name, version) for job in jobs for version in range(len(job.paths))]
    reports = {(name, version): json.loads((out / f"{name}-{version}.json").read_text()) for name, version in steps}
    return Dense({job.name: job for job in jobs}, reports, from_disk)


def dense_jobs(make: Make, dtype: str, urls: tuple[str, ...], out: Path) -> list[Job]:
    jobs = []
    for seed, (name, layout) in enumerate(LAYOUTS.items()):
        path = write_weights(make, seed, out / name)
        sync = {"transports": ["broadcast"], "dtype": dtype}
        jobs.append(Job(name, layout, urls, (path,), sync))
        if name in BY_DISK:
            by_disk = {**sync, "transports": ["disk"], "disk_path": str(out / "synced")}
            jobs.append(
                Job(f"{name}_disk", layout, urls, (write_weights(make, seed + 20, out / f"{name}_d"),), by_disk)
            )
        if name in ("tp2_sp_pp2", "pp2_vpp2_dp2"):
            first = write_weights(make, seed + 40, out / f"{name}_0")
            paths = (first, change_a_tenth(first, out / f"{name}_1"))
            jobs.append(Job(f"{name}_delta", layout, urls, paths, {**sync, "transports": ["delta"]}))
        if name == "dp4":
            paths = tuple(write_weights(make, seed + 60 + i, out / f"{name}_s{i}") for i in range(2))
            jobs.append(Job(f"{name}_sample", layout, urls, paths, {**sync, "verify": "sample"}))
        if name == "tp2_dp2":
            linked = {**sync, "transports": ["disk"], "disk_path": str(out / "synced")}
            linked["disk_path_on_servers"] = str(out / LINK)
            (out / LINK).symlink_to(out / "synced")
            jobs.append(Job(f"{name}_linked", layout, urls, (write_weights(make, 70, out / f"{name}_l"),), linked))
    return jobs


STEPS = [
    *((name, 0) for name in LAYOUTS),
    *((f"{name}_disk", 0) for name in BY_DISK),
    *((f"{name}_delta", version) for name in ("tp2_sp_pp2", "pp2_vpp2_dp2") for version in (0, 1)),
    *(("dp4_sample", version) for version in (0, 1)),
    ("tp2_dp2_linked", 0),
]


@contextmanager
def servers(start: str, dtype: str, out: Path) -> Iterator[tuple[str, ...]]:
    """URLs of two running servers, of one and of two ranks."""
    rollouts = [RolloutConfig(context_length=32, max_response_tokens=8, server_tensor=tp_size) for tp_size in (1, 2)]
    running = [
        SGLangServer(
            start, rollout, dtype=dtype, log_path=out / f"sglang-tp{rollout.server_tensor}.log", weight_loader=LOADER
        )
        for rollout in rollouts
    ]
    with ExitStack() as stack:
        for server in running:
            stack.callback(server.stop)
            server.start()
        for server, rollout in zip(running, rollouts, strict=True):
            server.wait_ready(rollout.startup_deadline_s)
        yield tuple(server.url for server in running)


def load_from_disk(url: str, path: str) -> Checksums:
    """What a server holds once it has loaded a directory that nothing of ours has written."""
    post_json(url, "update_weights_from_disk", {"model_path": path, "flush_cache": False}, DEADLINE_S)
    return [dict(rank["checksums"]) for rank in control.checksums(url, (), DEADLINE_S)]


def unlike(wanted: Checksums, found: Checksums) -> list[str]:
    """Server parameters that differ on any rank."""
    assert len(wanted) == len(found)
    pairs = zip(wanted, found, strict=True)
    return sorted(
        {name for one, other in pairs for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    )


@pytest.mark.parametrize(("name", "version"), STEPS, ids=lambda value: str(value))
def test_servers_hold_after_a_sync_what_they_hold_after_loading_the_same_weights(
    name: str, version: int, dense: Dense
) -> None:
    report = dense.reports[name, version]
    wanted = dense.from_disk[dense.jobs[name].paths[version]]
    assert [len(ranks) for ranks in wanted.values()] == [1, 2]
    found = {url: unlike(ranks, report["checksums"][url]) for url, ranks in wanted.items()}
    assert found == {url: [] for url in wanted}
    assert report["differing"] == []
    assert report["transport"] == dense.jobs[name].sync["transports"][0]


def test_no_sync_could_pass_by_leaving_a_tensor_alone(dense: Dense) -> None:
    """Else the test above would prove little."""
    order = [path for job in dense.jobs.values() for path in job.paths]
    for before, after in pairwise(order):
        for url, ranks in dense.from_disk[after].items():
            alike = {name for rank in ranks for name in rank} - set(unlike(ranks, dense.from_disk[before][url]))
            assert all(after.endswith("_1") and ".layers.1." in name for name in alike), alike


def test_servers_load_from_the_path_where_they_see_the_folder(dense: Dense) -> None:
    paths = dense.reports["tp2_dp2_linked", 0]["model_paths"].values()
    assert {Path(path).name for path in paths} == {LINK}
    paths = dense.reports["tp2_pp2_disk", 0]["model_paths"].values()
    assert {Path(path).name for path in paths} == {"synced"}


def test_a_delta_is_much_smaller_than_all_weights(dense: Dense) -> None:
    """Else `delta` has sent everything, and its own loader is not proved."""
    for name in ("tp2_sp_pp2_delta", "pp2_vpp2_dp2_delta"):
        everything, change = (dense.reports[name, version]["sent_bytes"] for version in (0, 1))
        assert 0 < change < everything / 2
