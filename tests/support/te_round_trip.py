"""Hugging Face tensors into Transformer Engine's layers and back, of each model in a directory.

python -m tests.support.te_round_trip MODELS OUT: OUT is a JSON object of each model's findings. A process of its own,
since it takes stand-ins for the compiled part of Transformer Engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_rpp import device  # before megatron
from tests.support.te_stand_in import import_te_classes

import_te_classes()
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig  # noqa: E402
from megatron_rpp.model import build, transformer_config  # noqa: E402
from megatron_rpp.model.export_hf import hf_tensors  # noqa: E402
from megatron_rpp.model.hf_mapping import family_of  # noqa: E402
from megatron_rpp.model.shards import sharded_parameters  # noqa: E402
from megatron_rpp.parallel import bootstrap  # noqa: E402
from megatron_rpp.parallel.context import ParallelContext  # noqa: E402


def main() -> None:
    models, out = map(Path, sys.argv[1:])
    build.resolve_layer_spec = transformer_config.resolve_layer_spec = lambda choice: "te"
    torch.cuda.is_available = lambda: True  # Transformer Engine asks; the device package has answered for itself
    assert not device.has_cuda()
    parallel = bootstrap.initialize(ParallelConfig(), seed=0)
    out.write_text(json.dumps({path.name: round_trip(path, parallel) for path in sorted(models.iterdir())}))


def round_trip(path: Path, parallel: ParallelContext) -> dict[str, Any]:
    """Tensors that are lost, invented, or changed on the way; which dimension of each Transformer Engine splits over
    TP ranks; and the classes of its layers."""
    config = Config(model=ModelConfig(path=str(path), dtype="float32"))
    model = build.build_model(config, parallel, path=str(path))
    stored = load_file(path / "model.safetensors")
    exported = dict(hf_tensors(model))
    both = stored.keys() & exported.keys()
    family, parts = family_of(model.hf), sharded_parameters(model.chunks)
    return {
        "classes": sorted({type(m).__name__ for m in model.chunks[0].modules() if type(m).__name__.startswith("TE")}),
        "split": {name: part.dim for part in parts for name in family.find(part.name)[1]},
        "lost": sorted(stored.keys() - exported.keys()),
        "invented": sorted(exported.keys() - stored.keys()),
        "changed": sorted(name for name in both if not torch.equal(exported[name], stored[name])),
    }


if __name__ == "__main__":
    main()
