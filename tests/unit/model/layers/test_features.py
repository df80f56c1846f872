"""Which modules a family's layer is made of, and under which keys a checkpoint holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.conversion.skeleton import build_skeleton
from megatron_rpp.model.hf_mapping import read_hf_config
from tests.support.tiny_models import save_tiny


@pytest.mark.parametrize("family", ["gemma2", "glm4"])
def test_norms_behind_attention_and_mlp_have_megatron_bridges_checkpoint_keys(family: str, tmp_path: Path) -> None:
    """Another name would be refused as missing when a checkpoint of Megatron-Bridge is loaded."""
    skeleton = build_skeleton(read_hf_config(str(save_tiny(family, tmp_path))))
    keys: dict[str, Any] = {slot.name: slot.keys for slot in skeleton.slots}
    layers = "decoder.layers."
    assert keys[f"{layers}2.self_attn_bda.norm.weight"] == (
        f"{layers}self_attention.linear_proj.post_layernorm.weight",
    )
    assert keys[f"{layers}2.mlp_bda.norm.weight"] == (f"{layers}mlp.linear_fc2.post_layernorm.weight",)
