"""Which layers, kernels and FP8 settings a model gets, by what the host has."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rpp import device
from megatron_rpp.config.performance import Fp8Config, MemoryConfig
from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rpp.device.gpus import GPU
from megatron_rpp.model import fp8, layer_spec
from megatron_rpp.model.fp8 import check_can_compute, fp8_settings, shares_scales, token_multiple_of
from megatron_rpp.model.fusions import fusion_settings
from megatron_rpp.model.hf_config import MLA, Rope
from megatron_rpp.model.layer_spec import agreed_layer_spec, resolve_layer_spec
from megatron_rpp.model.transformer_config import _exchange_settings, transformer_config
from tests.unit.model.test_fp8_shapes import QWEN

Host = Callable[..., None]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """host(cuda=..., te=..., kernels=...): te is False (not installed), True, or the error that its import ends in;
    kernels what its norm does."""

    def pretend(*, cuda: bool = True, te: Any = True, apex: bool = False, kernels: Any = torch.nn.RMSNorm) -> None:
        layer_spec._missing_for_te.cache_clear()
        present = {"transformer_engine": te is not False, "fused_weight_gradient_mlp_cuda": apex}
        find, load = importlib.util.find_spec, importlib.import_module

        def find_spec(name: str, package: str | None = None) -> Any:
            return (SimpleNamespace() if present[name] else None) if name in present else find(name, package)

        def import_module(name: str, package: str | None = None) -> Any:
            if name != "transformer_engine.pytorch":
                return load(name, package)
            if isinstance(te, Exception):
                raise te
            return SimpleNamespace(RMSNorm=lambda size, params_dtype, device: kernels(size, dtype=params_dtype))

        monkeypatch.setattr(device, "has_cuda", lambda: cuda)
        monkeypatch.setattr(device, "current", lambda: torch.device("cpu"))
        monkeypatch.setattr(layer_spec, "gpus", lambda: [GPU("B200", 1 << 37, (10, 0))] * 8)
        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(importlib, "import_module", import_module)

    yield pretend
    layer_spec._missing_for_te.cache_clear()


BROKEN = OSError("libcudart.so.12: cannot open shared object file")


@pytest.mark.parametrize(
    ("cuda", "te", "chosen"),
    [(True, True, "te"), (True, False, "local"), (False, True, "local"), (True, BROKEN, "local")],
)
def test_auto_takes_what_can_run(host: Host, cuda: bool, te: Any, chosen: str) -> None:
    host(cuda=cuda, te=te)
    assert (resolve_layer_spec("auto"), resolve_layer_spec("local")) == (chosen, "local")


@pytest.mark.parametrize(
    ("cuda", "te", "missing"),
    [
        (False, True, "a GPU, and this process sees none"),
        (True, False, "transformer-engine, which is not installed"),
        (True, BROKEN, "cannot be imported: libcudart.so.12"),
        (True, RuntimeError(), "cannot be imported: RuntimeError"),
    ],
)
def test_a_choice_that_cannot_run_tells_what_is_missing(host: Host, cuda: bool, te: Any, missing: str) -> None:
    host(cuda=cuda, te=te)
    with pytest.raises(ValueError, match=missing):
        resolve_layer_spec("te")


class OfAnotherGpu(torch.nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("rmsnorm_api.cpp:82 in function forward:\n  no kernel image is available")


class Silent(torch.nn.RMSNorm):
    """What a launch that fails unnoticed leaves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        (OfAnotherGpu, r"run on this GPU \(B200\): rmsnorm_api.cpp:82 in function forward: no kernel image"),
        (Silent, r"run on this GPU \(B200\): the RMSNorm of ones is 0.0"),
    ],
)
def test_an_engine_that_is_built_for_other_gpus_is_not_taken(
    host: Host, caplog: pytest.LogCaptureFixture, kernels: Any, reason: str
) -> None:
    """It imports, and would end at the first layer."""
    host(kernels=kernels)
    with caplog.at_level(logging.WARNING):
        assert resolve_layer_spec("auto") == "local"
    with pytest.raises(ValueError, match=f"model.layer_spec=te needs .*{reason}.*; use auto or local") as caught:
        resolve_layer_spec("te")
    assert "\n" not in str(caught.value)
    assert [re.search(reason, record.getMessage()) is not None for record in caplog.records] == [True]


def test_a_broken_engine_is_told_once_where_auto_passes_it_over(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host(te=BROKEN)
    with caplog.at_level(logging.WARNING):
        assert [resolve_layer_spec("auto") for _ in range(3)] == ["local"] * 3
    (record,) = caplog.records
    assert "libcudart.so.12" in record.getMessage()


def test_ranks_that_would_build_other_layers_are_named_with_their_reason(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[tuple[str, str]] = [("te", "")] * 3
    monkeypatch.setattr(layer_spec, "gather_objects", lambda own: [*others, own])
    host(te=BROKEN)
    with pytest.raises(ValueError, match=r"rank 3 of 4 cannot run .*: they need transformer-engine.*libcudart.so.12"):
        agreed_layer_spec("auto")
    host(cuda=False)
    with pytest.raises(ValueError, match=r"rank 3 of 4 cannot run .*: they need a GPU, .*; mend their hosts, or set"):
        agreed_layer_spec("auto")
    host()
    assert agreed_layer_spec("auto") == "te"
    others[:] = [("local", "x"), ("local", "y")]
    with pytest.raises(ValueError, match=r"ranks 0, 1 of 3 cannot run .*: they need x / y; "):
        agreed_layer_spec("auto")
    others[:] = [("local", "")] * 2
    assert agreed_layer_spec("local") == "local"


def test_a_gpu_that_is_full_is_not_taken_for_a_broken_engine(host: Host) -> None:
    class Full(torch.nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    host(kernels=Full)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        resolve_layer_spec("auto")


def test_fp8_without_the_engine_is_an_error_and_not_bfloat16(host: Host) -> None:
    host(cuda=False)
    config = Config(model=ModelConfig(dtype="bfloat16"), fp8=Fp8Config("tensorwise"))
    with pytest.raises(ValueError, match=r"fp8.recipe=tensorwise needs Transformer Engine and a GPU"):
        check_can_compute(config, resolve_layer_spec("auto"))
    check_can_compute(replace(config, fp8=Fp8Config()), "local")


def test_a_gpu_that_lacks_the_recipe_is_named_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "gpus", lambda: [GPU("H200", 1 << 37, (9, 0))])
    monkeypatch.setattr(fp8, "software", lambda: {"CUDA": "13.0"})
    check_can_compute(Config(fp8=Fp8Config("blockwise")), "te")
    with pytest.raises(ValueError, match=r"fp8.recipe=mxfp8 needs compute capability 10.0, H200 has 9.0"):
        check_can_compute(Config(fp8=Fp8Config("mxfp8")), "te")


def test_an_engine_too_old_to_recompute_norms_in_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = ["2.5.0+cu13"]
    monkeypatch.setattr(fp8, "package_version", lambda name: version[0])
    memory = MemoryConfig(recompute="selective", recompute_modules=("mlp", "layernorm"))
    config = Config(fp8=Fp8Config("tensorwise"), memory=memory)
    with pytest.raises(ValueError, match=r"recompute_modules=layernorm .* needs transformer-engine 2\.6 .* 2\.5\.0"):
        check_can_compute(config, "te")
    check_can_compute(replace(config, memory=replace(memory, recompute="none")), "te")
    version[0] = "2.20.2"
    check_can_compute(config, "te")


def test_megatron_is_told_the_recipe_and_local_layers_are_not() -> None:
    settings = fp8_settings(Fp8Config("blockwise", params=True, bf16_last_layers=2, amax_history=5), "te")
    built = _megatron(settings)
    assert (built.fp8, built.fp8_recipe, built.fp8_param, built.fp8_amax_history_len) == (
        "hybrid",
        "blockwise",
        True,
        5,
    )
    assert built.first_last_layers_bf16
    assert (built.num_layers_at_start_in_bf16, built.num_layers_at_end_in_bf16) == (0, 2)
    assert not _megatron(fp8_settings(Fp8Config("tensorwise"), "te")).first_last_layers_bf16
    assert fp8_settings(Fp8Config("blockwise"), "local") == fp8_settings(Fp8Config(), "te") == {}


def _megatron(settings: dict[str, Any]) -> Any:
    """Megatron's own configuration with the settings, so that it has its say about their names and values."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, **settings)


def test_what_the_engine_does_depends_on_the_recipe() -> None:
    of: dict[str, Any] = {
        recipe: _megatron(fp8_settings(Fp8Config(recipe), "te"))
        for recipe in ("none", "delayed", "tensorwise", "blockwise", "mxfp8")
    }
    assert [token_multiple_of(each) for each in of.values()] == [1, 16, 16, 128, 32]
    assert [recipe for recipe, each in of.items() if shares_scales(each)] == ["delayed"]


def test_fused_kernels_are_used_where_they_are_right(host: Host) -> None:
    host(apex=True)
    fused = {name for name, on in fusion_settings(QWEN, "te").items() if on}
    assert fused == {"gradient_accumulation_fusion", "bias_activation_fusion", "apply_rope_fusion"}
    assert not fusion_settings(replace(QWEN, activation="gelu_tanh"), "te")["bias_activation_fusion"]
    for hf in (
        replace(QWEN, rope=Rope(1e4, 0.5, interleaved=True)),
        replace(QWEN, sliding_rope=Rope(1e4)),
        replace(QWEN, mla=MLA(None, 512, 128, 64, 128)),
    ):
        assert not fusion_settings(hf, "te")["apply_rope_fusion"]
    host(apex=False)
    assert not fusion_settings(QWEN, "te")["gradient_accumulation_fusion"], "Megatron raises without apex"
    assert not any(fusion_settings(QWEN, "local").values())


def test_no_fusion_is_asked_for_on_cpu(host: Host) -> None:
    host(cuda=False, apex=True)
    assert not any(fusion_settings(QWEN, "te").values())


def test_interleaved_stages_do_not_exchange_in_a_batch(host: Host) -> None:
    """Two of them are both neighbours of each other, and a batch pairs by order."""
    host()
    plain, interleaved = ParallelConfig(pipeline=2), ParallelConfig(pipeline=2, virtual_pipeline=2)
    assert _exchange_settings(plain) == {"batch_p2p_comm": True, "overlap_p2p_comm": False}
    assert _exchange_settings(interleaved) == {"batch_p2p_comm": False, "overlap_p2p_comm": True}
    host(cuda=False)
    assert _exchange_settings(interleaved) == {"batch_p2p_comm": False, "overlap_p2p_comm": False}


def test_the_whole_configuration_is_one_that_megatron_takes() -> None:
    built = transformer_config(QWEN, Config())
    assert not built.fp8 and math.isclose(built.layernorm_epsilon, 1e-5)
