"""The mapping against the parameters of Transformer Engine's own layers, as the release on GPU hosts names them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.support.tiny_models import FAMILY_NAMES, MOE_FAMILY_NAMES, save_tiny

Findings = dict[str, dict[str, Any]]
ROWS = re.compile(r"(q|k|v|q_b|kv_b|gate|up|gate_up)_proj|w1|w3|embed_tokens|lm_head")  # of the matrix: its outputs
COLUMNS = re.compile(r"(o|down)_proj|w2")


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out") / "findings.json"
    for family in FAMILY_NAMES:
        save_tiny(family, models)
    command = [sys.executable, "-m", "tests.support.te_round_trip", str(models), str(out)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found: Findings = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_tensor_goes_through_transformer_engine_layers_and_back_unchanged(
    findings: Findings, family: str
) -> None:
    found = findings[family]
    assert {name: found[name] for name in ("lost", "invented", "changed")} == {
        "lost": [],
        "invented": [],
        "changed": [],
    }


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tensor_ranks_split_each_matrix_by_its_outputs_or_its_inputs(findings: Findings, family: str) -> None:
    for name, dim in findings[family]["split"].items():
        leaf = name.split(".")[-2]
        assert dim == (0 if ROWS.fullmatch(leaf) else 1 if COLUMNS.fullmatch(leaf) else None), name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_layers_fuse_norms_group_experts_and_attend_as_transformer_engine_does(findings: Findings, family: str) -> None:
    classes = findings[family]["classes"]
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= set(classes)
    assert ("TEDotProductAttention" in classes) == (family != "gemma2")  # whose soft caps it does not know
    assert ("TEColumnParallelGroupedLinear" in classes) == (family in MOE_FAMILY_NAMES)
