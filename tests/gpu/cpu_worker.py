"""Runs every body that CPU can run, tiny and with local layers: for tests/unit/gpu_scripts, as one rank.

    python -m tests.gpu.cpu_worker OUT

OUT/found.json says of each body `ok` or what it raised.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.model.build import build_model
from megatron_rpp.model.hf_io.fp8_blocks import dequantize, quantize
from tests.gpu.families import OTHERS, save
from tests.gpu.served import different
from tests.gpu.site import Site, clean, open_site
from tests.gpu.test_colocated import float8_arrives, sync_by_ipc
from tests.gpu.test_families import fp8_experts_compute, te_strays_as_local
from tests.gpu.test_fp8_bytes import device_is_cpu
from tests.gpu.test_fp8_checkpoint import a_resumed_run_goes_on
from tests.gpu.test_fp8_scales import first_gradient_is_that_of_bfloat16
from tests.gpu.test_fp8_served import SAME, SEAMS, leaves
from tests.gpu.test_fp8_training import fp8_trains_as_bfloat16, policy_is_reference
from tests.gpu.test_groups import collectives_work
from tests.gpu.test_layer_specs import packed_is_padded, te_is_local
from tests.gpu.test_logprobs import fused_is_chunked
from tests.gpu.test_offload import offload_changes_nothing
from tests.gpu.test_profile import a_step_is_recorded
from tests.gpu.test_speed import ANYWHERE, changes_nothing


def kl_of_bfloat16(site: Site) -> None:
    policy_is_reference(site, site.config(site.llama()))


class Copy:
    """A stand-in for what a layer of Transformer Engine keeps of a weight that it has quantized."""

    def __init__(self, weight: Tensor) -> None:
        self.values, self.scales = quantize(weight.detach(), power_of_two=True)

    def dequantize(self, *, dtype: torch.dtype) -> Tensor:
        return dequantize(self.values, self.scales, dtype)


def served_values_are_compared(site: Site) -> None:
    """At the sizes of a GPU: seams within blocks are found, a changed value and a matrix left out too."""
    for family, expected in {SAME[0]: set(), SEAMS: {"k_proj", "v_proj"}, SAME[1]: set()}.items():
        path = save(replace(site, is_tiny=False), family)
        model = build_model(site.config(path), site.parallel, path=str(path))
        model.config.fp8, model.config.fp8_recipe = "hybrid", "blockwise"
        owners: list[Any] = [module for chunk in model.chunks for name, module in chunk.named_modules()
                             if name.rpartition(".")[2].startswith("linear_")]  # fmt: skip
        for module in owners:
            module._fp8_workspaces = {"weight": Copy(module.weight)}
        found = leaves(different(model))
        assert found == expected, (family, found)
    owners[-1]._fp8_workspaces["weight"].values.view(torch.uint8)[0, 0] ^= 1
    assert len(different(model)) == 1
    owners[-1]._fp8_workspaces.clear()
    try:
        different(model)
    except AssertionError:
        return
    raise AssertionError("a matrix that no layer has quantized, and servers hold in FP8, was not missed")


BODIES: dict[str, Callable[[Site], object]] = {
    "te_is_local": te_is_local,
    "packed_is_padded": packed_is_padded,
    **{f"te_strays_as_local {family}": partial(te_strays_as_local, family=family) for family in OTHERS},
    "fp8_experts_compute": partial(fp8_experts_compute, recipe="none"),
    "served_values_are_compared": served_values_are_compared,
    "fp8_trains_as_bfloat16": partial(fp8_trains_as_bfloat16, recipe="none"),
    "policy_is_reference": kl_of_bfloat16,
    "first_gradient_is_that_of_bfloat16": partial(first_gradient_is_that_of_bfloat16, recipe="none"),
    "a_resumed_run_goes_on": partial(a_resumed_run_goes_on, recipe="none"),
    "device_is_cpu": device_is_cpu,
    "fused_is_chunked": fused_is_chunked,
    "offload_changes_nothing": offload_changes_nothing,
    "collectives_work": collectives_work,
    "sync_by_ipc": sync_by_ipc,
    "float8_arrives": partial(float8_arrives, recipe="none", transport="broadcast"),
    "a_step_is_recorded": partial(a_step_is_recorded, kinds=("trace",)),
    **{name: partial(changes_nothing, change=change) for name, change in ANYWHERE.items()},
}


def main() -> None:
    out = Path(sys.argv[1])
    found = {}
    with open_site(out, is_tiny=True) as site:
        for name, body in BODIES.items():
            try:
                (out / name).mkdir()
                body(replace(site, folder=out / name))
                found[name] = "ok"
            except Exception:
                found[name] = traceback.format_exc()
            clean()
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
