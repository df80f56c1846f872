"""What config.json says of quantization: blocks of FP8, nothing, or something that is refused."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rpp.model.hf_io.fp8_blocks import BLOCK

_ADVICE = "start from the model's unquantized or block-scaled FP8 checkpoint"


def weight_block(folder: Path) -> tuple[int, int]:
    """Rows and columns of an FP8 block by the directory's config.json; 128 x 128 where it does not say.

    Raises ValueError for a quantization other than block-scaled FP8, and for a config.json that is not JSON.
    """
    config = folder / "config.json"
    if not config.exists():
        return BLOCK
    try:
        whole = dict(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{config} is not a model's configuration: {error}") from error
    stated = whole.get("quantization_config") or whole.get("compression_config")  # the latter of compressed-tensors
    if not stated:
        return BLOCK
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if method != "fp8":
        raise ValueError(f"{config}: weights quantized by {method!r} cannot be read; {_ADVICE}")
    block = stated.get("weight_block_size", list(BLOCK))
    if block is None:
        raise ValueError(f"{config}: FP8 with one scale a tensor (weight_block_size null) cannot be read; {_ADVICE}")
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise ValueError(f"{config}: weight_block_size={block} must be two positive integers")
    return block[0], block[1]
