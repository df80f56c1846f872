"""Multi-token prediction layers added to a tiny model's directory, as hub checkpoints hold them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LAYER = 4  # behind the tiny models' layers 0 to 3


def add_mtp(path: Path) -> None:
    """One MTP layer with random values, but for the copies of embedding and output weights. Changes `path`."""
    torch.manual_seed(11)
    file = path / "model.safetensors"
    tensors = load_file(file)
    last, own = f"model.layers.{LAYER - 1}.", f"model.layers.{LAYER}."
    layer = {own + n.removeprefix(last): torch.randn_like(t) for n, t in tensors.items() if n.startswith(last)}
    hidden = tensors["model.norm.weight"].shape[0]
    layer |= {f"{own}{name}.weight": torch.randn(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
    layer[f"{own}eh_proj.weight"] = torch.randn(hidden, 2 * hidden)
    layer[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    layer[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file({**tensors, **layer}, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (path / "config.json").write_text(json.dumps(config))
