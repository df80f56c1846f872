"""One rank of a layout such as context=2: `python -m tests.gpu.layout_worker MODEL OUT gpu|shared|tiny LAYOUT`.

By a launcher. OUT gets the log-probs of the fixed batch and the first gradient's norm. `shared`: all ranks on one GPU,
over gloo, since NCCL refuses two ranks on a device; and the log-probs alone, since gloo's coalesced collectives, with
which Megatron sums gradients, are for CPU tensors.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rpp import device
from megatron_rpp.config.fields import build
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.parallel import bootstrap
from tests.gpu.site import Site
from tests.gpu.test_fp8_scales import first_step
from tests.gpu.test_layer_specs import logprobs_of


def layout_of(text: str) -> ParallelConfig:
    """`tensor=2,sequence=1` as a configuration; `one` is one rank."""
    keys = dict(part.split("=") for part in text.split(",")) if text != "one" else {}
    return build({f"parallel.{key}": bool(int(n)) if key == "sequence" else int(n) for key, n in keys.items()}).parallel


def main() -> None:
    model, out, kind, text = sys.argv[1:]
    if kind == "shared":
        device.backend = lambda: "gloo"  # type: ignore[assignment]
        device.identity = lambda: None  # type: ignore[assignment] # ranks that share a GPU would be an error
    layout = layout_of(text)
    parallel = bootstrap.initialize(layout, seed=0)
    site = Site(parallel, Path(model).parent, is_tiny=kind == "tiny")
    config = replace(site.config(Path(model)), parallel=layout)
    config = replace(config, algorithm=replace(config.algorithm, kl_coef=0.0))
    found: dict[str, Any] = {"logprobs": logprobs_of(site, config)}
    if kind != "shared":
        found["grad_norm"] = first_step(site, config)[1]
    if parallel.rank == 0:
        torch.save(found, out)
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
