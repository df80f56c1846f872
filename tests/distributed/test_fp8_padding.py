"""Tokens that fill FP8's blocks on every rank change no loss and no gradient, padded or packed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpp.config.schema import ParallelConfig
from tests.distributed.layouts import run_on
from tests.support.tiny_models import save_tiny

LAYOUTS = {
    "tp2_sp": (ParallelConfig(tensor=2, sequence=True), (0, 1)),
    "tp2_sp_cp2": (ParallelConfig(tensor=2, sequence=True, context=2), (1,)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_for_fp8_changes_nothing(name: str, tmp_path: Path) -> None:
    layout, packed = LAYOUTS[name]
    models = [str(save_tiny(family, tmp_path / "models")) for family in ("llama", "mixtral")]
    run_on(layout, "fp8_padding_worker", {"models": models, "micro_batch_tokens": packed}, tmp_path / name)
