"""One of SIZE context parallel ranks: `python -m tests.gpu.context_worker MODEL OUT gpu|tiny SIZE`, by a launcher."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.parallel import bootstrap
from tests.gpu.site import Site
from tests.gpu.test_layer_specs import logprobs_of


def main() -> None:
    model, out, kind, size = sys.argv[1:]
    layout = ParallelConfig(context=int(size))
    parallel = bootstrap.initialize(layout, seed=0)
    site = Site(parallel, Path(model).parent, is_tiny=kind == "tiny")
    found = logprobs_of(site, replace(site.config(Path(model)), parallel=layout))
    if parallel.rank == 0:
        torch.save(found, out)
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
