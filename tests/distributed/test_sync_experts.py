"""After a sync, whatever the layout of experts, a server is given the trainer's weights bit for bit, in any dtype.

SGLang does not run these models on CPU; in its place stands tests/support/receiver.py, and the measure is the
directory that the trainer has loaded.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.model.hf_io.fp8_blocks import SCALE_SUFFIX, is_quantized, quantize
from tests.integration.sync_worker import Job
from tests.support.tiny_models import MODELS, QWEN3_MOE, SHAPE
from tests.support.weight_syncs import change_a_tenth, launch, tensors_of, write_weights

Tensors = dict[str, Tensor]

LAYOUTS = {  # of four ranks: one launch for all
    "dp4": ParallelConfig(data=4),
    "dp4_ep2": ParallelConfig(data=4, expert=2),
    "tp2_sp_dp2_ep2": ParallelConfig(tensor=2, sequence=True, data=2, expert=2),
    "tp2_sp_dp2_ep4": ParallelConfig(tensor=2, sequence=True, data=2, expert=4),
    "pp2_dp2_ep2": ParallelConfig(pipeline=2, data=2, expert=2),
    "tp2_sp_pp2_ep2": ParallelConfig(tensor=2, sequence=True, pipeline=2, expert=2),
    "dp4_ep2_etp2": ParallelConfig(data=4, expert=2, expert_tensor=2),
    "cp2_dp2": ParallelConfig(context=2, data=2),
    "tp2_sp_cp2_ep4": ParallelConfig(tensor=2, sequence=True, context=2, expert=4),
}


def experts_of_several_blocks() -> PreTrainedModel:
    """A shard's rows begin and end within an FP8 block, and the last block is not full."""
    shape = {**SHAPE, "hidden_size": 192, "intermediate_size": 320}
    experts = {**QWEN3_MOE, "head_dim": 40, "moe_intermediate_size": 160}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, tie_word_embeddings=False))


@dataclass(frozen=True)
class Sync:
    """One sync: what the trainer was given, and what has arrived."""

    source: Tensors
    arrived: Tensors
    bucket_sizes: list[int]


EXPERT_FAMILIES = {"qwen3_moe": MODELS["qwen3_moe"], "deepseek_v3": MODELS["deepseek_v3"], "mixtral": MODELS["mixtral"]}
EXACT = [(family, name) for family in ("qwen3_moe", "deepseek_v3") for name in LAYOUTS]
EXACT += [("mixtral", "tp2_sp_pp2_ep2")]
BFLOAT16 = [("deepseek_v3", "tp2_sp_pp2_ep2"), ("deepseek_v3", "dp4_ep2")]
FLOAT8 = [("several_blocks", "dp4"), ("several_blocks", "tp2_sp_dp2_ep2"), ("several_blocks", "dp4_ep2_etp2")]


OTHERWISE = [("qwen3_moe", "tp2_sp_dp2_ep2", "disk"), ("qwen3_moe", "tp2_sp_pp2_ep2", "delta")]


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Sync]:
    """By family, layout and dtype; every sync has weights of its own."""
    out = tmp_path_factory.mktemp("experts")
    makers = {**EXPERT_FAMILIES, "several_blocks": experts_of_several_blocks}
    cases = [
        *((family, name, "float32") for family, name in EXACT),
        *((family, name, "bfloat16") for family, name in BFLOAT16),
        *((family, name, "float8") for family, name in FLOAT8),
    ]
    found = {}
    with receiver(out) as url:
        jobs = []
        for seed, (family, name, dtype) in enumerate(cases):
            path = write_weights(makers[family], seed, out / f"weights-{seed}")
            verify = "off" if dtype == "float8" else "full"
            sync = {"transports": ["broadcast"], "dtype": dtype, "verify": verify}
            jobs.append(Job(f"{family}-{name}-{dtype}", LAYOUTS[name], (url,), (path,), sync))
        for seed, (family, name, transport) in enumerate(OTHERWISE):
            paths = [write_weights(makers[family], 100 + seed, out / f"{transport}-0")]
            if transport == "delta":
                paths.append(change_a_tenth(paths[0], out / f"{transport}-1"))
            sync = {"transports": [transport], "dtype": "float32", "disk_path": str(out / "by-disk")}
            jobs.append(Job(f"{family}-{name}-{transport}", LAYOUTS[name], (url,), tuple(paths), sync))
        launch(jobs, out)
        finished = iter(sorted(out.glob("*.pt"), key=lambda path: int(path.stem)))
        for job, case in zip(jobs, [*cases, *OTHERWISE], strict=True):
            for path in job.paths:  # the last one's stays
                arrived = torch.load(next(finished))
                found[case] = Sync(tensors_of(path), arrived["tensors"], arrived["bucket_sizes"])
        assert next(finished, None) is None
    return found


@contextmanager
def receiver(out: Path, module: str = "receiver") -> Iterator[str]:
    """The URL of a running receiver, which numbers what it gets from 0. module: of tests/support."""
    argv = [sys.executable, "-m", f"tests.support.{module}", str(out)]
    with (out / f"{module}.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, f"the receiver has not started; see {out}/{module}.log"
        yield url
    finally:
        process.kill()
        process.wait()


def assert_same(arrived: Tensors, wanted: Tensors) -> None:
    """Names, dtypes, shapes and bits."""
    assert sorted(arrived) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (arrived[name].dtype, arrived[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(arrived[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(("family", "layout"), EXACT)
def test_tensors_of_experts_arrive_bit_for_bit(
    family: str, layout: str, synced: dict[tuple[str, str, str], Sync]
) -> None:
    sync = synced[family, layout, "float32"]
    assert any(".experts.3." in name for name in sync.source)
    assert_same(sync.arrived, sync.source)


@pytest.mark.parametrize(("family", "layout", "transport"), OTHERWISE)
def test_experts_arrive_by_other_transports_too(
    family: str, layout: str, transport: str, synced: dict[tuple[str, str, str], Sync]
) -> None:
    sync = synced[family, layout, transport]
    assert any(".experts.3." in name for name in sync.source)
    assert_same(sync.arrived, sync.source)
    assert sync.bucket_sizes == [], "it came by broadcast"


@pytest.mark.parametrize(("family", "layout"), BFLOAT16)
def test_masters_are_rounded_to_bfloat16_once_but_a_router_s_bias_is_not(
    family: str, layout: str, synced: dict[tuple[str, str, str], Sync]
) -> None:
    sync = synced[family, layout, "bfloat16"]
    biases = {name for name in sync.source if name.endswith("e_score_correction_bias")}
    assert len(biases) == 3
    wanted = {name: t if name in biases else t.bfloat16() for name, t in sync.source.items()}
    assert any(not torch.equal(t, t.bfloat16().float()) for name, t in sync.source.items() if name in biases)
    assert_same(sync.arrived, wanted)


@pytest.mark.parametrize(("family", "layout"), FLOAT8)
def test_fp8_blocks_are_those_of_the_whole_tensor_on_every_layout(
    family: str, layout: str, synced: dict[tuple[str, str, str], Sync]
) -> None:
    """A shard's own blocks would have other scales."""
    sync = synced[family, layout, "float8"]
    wanted: Tensors = {}
    for name, tensor in sync.source.items():
        if is_quantized(name, tensor.shape):
            wanted[name], wanted[name + SCALE_SUFFIX] = quantize(tensor)
        else:
            wanted[name] = tensor.bfloat16()
    assert wanted["model.layers.3.mlp.experts.3.gate_proj.weight" + SCALE_SUFFIX].shape == (2, 2)
    assert_same(sync.arrived, wanted)
    assert len(sync.bucket_sizes) > 2, "several buckets, so that none is lost between two"
