"""Config and tokenizer files beside the weights, so that a converted directory stands alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.model.export_hf import _COPIED
from megatron_rpp.model.mtp_export import tell_mtp

_OF_WEIGHTS = {"metadata.json", "run_state.json"}  # beside indices: what describes the source's own weights


def copy_sidecars(
    source: Path,
    folder: Path,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
    *,
    mtp_layers: int = 0,
) -> None:
    """Copy them from `source`; config.json then tells of the weights in `folder`: dtype, quantization, MTP layers."""
    for path in (path for pattern in _COPIED for path in sorted(source.glob(pattern))):
        if path.name not in _OF_WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    tell_mtp(config, str(source), mtp_layers)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def sidecar_bytes(source: Path) -> int:
    """Size of what copy_sidecars copies."""
    return sum(path.stat().st_size for pattern in _COPIED for path in source.glob(pattern))
