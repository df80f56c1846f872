"""The crown: one fixed batch gives the same advantages, loss and gradients on every layout, for every preset."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rpp.engine.heads import ALL_POSITIONS, REAL_POSITIONS
from megatron_rpp.model.hf_io.tensors import HFTensors
from tests.distributed.invariance_worker import algorithms_of, fixed_batch
from tests.distributed.layouts import (
    CONTEXT_LAYOUTS,
    EXPERT_CONTEXT_LAYOUTS,
    EXPERT_LAYOUTS,
    LAYOUTS,
    layouts_of,
    packed_runs_of,
    run_on,
)
from tests.support.tiny_models import FAMILY_NAMES, MOE_FAMILY_NAMES, save_tiny

CASES = [(family, name) for family in FAMILY_NAMES for name in algorithms_of(family, is_packed=False)]
BASELINE = "tp1_pp1_dp1"
POSITIONS = (REAL_POSITIONS, ALL_POSITIONS)
MICROBATCHES = {"one_row_a_microbatch": 1, "one_microbatch": 8}  # 2 rows elsewhere
PACKED = ", packed"  # behind the name of a layout
Result = dict[str, Any]
pytestmark = pytest.mark.timeout(1200)  # the first test waits for all jobs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[str, str], Result]]:
    """Layout, microbatch size or packed layout -> (family, algorithm) -> result; one job runs every case."""
    root = tmp_path_factory.mktemp("invariance")
    models = {family: str(save_tiny(family, root / "models")) for family in FAMILY_NAMES}
    every = {**LAYOUTS, **EXPERT_LAYOUTS, **CONTEXT_LAYOUTS, **EXPERT_CONTEXT_LAYOUTS}
    jobs = {name: (layout, 2) for name, layout in every.items()}
    jobs |= {name: (LAYOUTS[BASELINE], size) for name, size in MICROBATCHES.items()}
    found = {}
    for name, (layout, size) in jobs.items():
        fitting = {
            "padded": {family: path for family, path in models.items() if name in splits_of(family)},
            "packed": {family: path for family, path in models.items() if name + PACKED in splits_of(family)},
        }
        for kind in fitting:
            (root / name / kind).mkdir(parents=True)
        arguments = {**fitting, "out": str(root / name), "micro_batch_size": size}
        run_on(layout, "invariance_worker", arguments, root / name)
        found[name] = _results(root / name / "padded", fitting["padded"], name)
        found[name + PACKED] = _results(root / name / "packed", fitting["packed"], name + PACKED)
    return found


def _results(out: Path, families: Iterable[str], split: str) -> dict[tuple[str, str], Result]:
    found = {case: _merge(out, "-".join(case)) for family in families for case in cases_of(family, split)}
    for family in families:
        found[family, "weights"] = _stages(out, f"{family}-weights")
        found[family, "logits"] = {"logits": _replicas(out, f"{family}-logits")}
        found[family, "saved"] = {"path": out / f"{family}-saved"}
    return found


def cases_of(family: str, split: str) -> list[tuple[str, str]]:
    """(family, algorithm) of all that is trained on a split."""
    return [(family, name) for name in algorithms_of(family, is_packed=split.endswith(PACKED))]


def splits_of(family: str) -> list[str]:
    """Layouts, microbatch sizes and packed layouts that the family is run with."""
    return [*layouts_of(family), *MICROBATCHES, *(name + PACKED for name in packed_runs_of(family))]


def exports_of(family: str) -> list[str]:
    """Layouts, padded where they can be, for what the cut into microbatches does not touch."""
    names = list(layouts_of(family))
    return names + [name + PACKED for name in packed_runs_of(family) if name not in names]


def _merge(out: Path, case: str) -> Result:
    replicas = [torch.load(p) for p in sorted(out.glob(f"{case}-replica*.pt"))]
    row_names = ("advantages", "policy_logprobs", "ref_logprobs")
    rows = {k: torch.stack([r[k] for r in replicas], 1).flatten(0, 1) for k in row_names}
    return {"sums": replicas[0]["sums"], "positions": replicas[0]["positions"], "gradients": _stages(out, case), **rows}


def _replicas(out: Path, case: str) -> Tensor:
    """Rows are dealt to replicas in turn."""
    return torch.stack([torch.load(p) for p in sorted(out.glob(f"{case}-replica*.pt"))], 1).flatten(0, 1)


def _stages(out: Path, case: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(out.glob(f"{case}-stage*.pt")):
        stage = torch.load(path)
        assert not tensors.keys() & stage.keys(), "two stages export the same tensor"
        tensors |= stage
    return tensors


@pytest.mark.parametrize(("split", "family"), [(split, f) for f in FAMILY_NAMES for split in exports_of(f)])
def test_weights_loaded_on_a_layout_are_exported_bit_for_bit(
    results: dict[str, dict[tuple[str, str], Result]], split: str, family: str, tmp_path: Path
) -> None:
    stored, found = load_file(save_tiny(family, tmp_path) / "model.safetensors"), results[split][family, "weights"]
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("split", "family"), [(split, f) for f in MOE_FAMILY_NAMES for split in layouts_of(f)])
def test_a_directory_saved_on_a_layout_of_experts_is_the_checkpoint(
    results: dict[str, dict[tuple[str, str], Result]], split: str, family: str, tmp_path: Path
) -> None:
    """Ranks of other replicas hold experts that the first replica writes."""
    stored = load_file(save_tiny(family, tmp_path) / "model.safetensors")
    saved = HFTensors(str(results[split][family, "saved"]["path"]))
    assert set(saved.names) == stored.keys()
    assert all(torch.equal(saved.read(name), tensor) for name, tensor in stored.items())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Family -> transformers' logits [ROWS, WIDTH, V] of the fixed batch."""
    root, found = tmp_path_factory.mktemp("transformers"), {}
    for family in FAMILY_NAMES:
        # Of transformers' attentions, sdpa forgets soft caps without a word.
        model = AutoModelForCausalLM.from_pretrained(save_tiny(family, root), attn_implementation="eager")
        with torch.no_grad():
            found[family] = model(fixed_batch().tokens).logits
    return found


@pytest.mark.parametrize(
    ("split", "family"), [(split, f) for f in FAMILY_NAMES for split in splits_of(f) if split not in MICROBATCHES]
)
def test_logits_on_a_layout_are_those_of_transformers(
    results: dict[str, dict[tuple[str, str], Result]], theirs: dict[str, Tensor], split: str, family: str
) -> None:
    predict = fixed_batch().loss_mask[:, 1:] > 0  # a replica is as wide as its own rows
    difference = (results[split][family, "logits"]["logits"] - theirs[family])[:, :-1][predict]
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_policy_logprobs_are_those_of_transformers(
    results: dict[str, dict[tuple[str, str], Result]], theirs: dict[str, Tensor], family: str
) -> None:
    """All layouts agreeing on the wrong rotary base, norm or head order would not show above."""
    batch, logprobs = fixed_batch(), theirs[family].double().log_softmax(-1)
    expected = logprobs[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0] * batch.loss_mask[:, 1:]
    found = results[BASELINE][family, "paper"]["policy_logprobs"][:, 1:]
    assert (found - expected).abs().max() < 1e-5
    assert expected.abs().max() > 1


@pytest.mark.parametrize(
    ("split", "case"),
    [
        pytest.param(split, case, id="-".join((split, *case)))
        for family in FAMILY_NAMES
        for split in splits_of(family)
        for case in cases_of(family, split)
        if split != BASELINE
    ],
)
def test_layout_and_microbatches_change_neither_advantages_nor_loss_nor_gradients(
    results: dict[str, dict[tuple[str, str], Result]], split: str, case: tuple[str, str]
) -> None:
    expected, found = results[BASELINE][case], results[split][case]
    for name in ("policy_logprobs", "ref_logprobs"):
        assert (found[name] - expected[name]).abs().max() < 1e-5, name
    assert (found["advantages"] - expected["advantages"]).abs().max() < 1e-10
    assert found["sums"].keys() == expected["sums"].keys()
    # A loss is what is left of terms as large as the advantages, which cancel; their rounding does not.
    trained = expected["advantages"][expected["advantages"] != 0]
    terms = {name: trained.abs().mean().item() for name in expected["sums"] if name.startswith("loss/")}
    for name, value in expected["sums"].items():
        allowed = max(1e-7, min(1e-6 * terms.get(name, 0.0), 1e-5 * abs(value.item())))
        assert found["sums"][name].item() == pytest.approx(value.item(), rel=1e-6, abs=allowed), name
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: gradient differs by {error:.2e}"


@pytest.mark.parametrize("split", [BASELINE, "dp2_distributed_optimizer", "cp2"])
def test_packed_sequences_leave_out_what_padded_rows_hold(
    results: dict[str, dict[tuple[str, str], Result]], split: str
) -> None:
    """The batch has 68 tokens that predict something or stand before; if nothing were packed, all would still agree."""
    real, run = (results[split + PACKED]["llama", "paper"]["positions"][name] for name in POSITIONS)
    assert real == 68
    # CP ranks share slots of multiples of 4.
    assert run == (68 if split != "cp2" else 12 + 8 + 16 + 12 + 12 + 4 + 16)
    padded_run = results[BASELINE]["llama", "paper"]["positions"][ALL_POSITIONS]
    assert padded_run == 8 * 13


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_baseline_case_clips_and_reaches_every_parameter(
    results: dict[str, dict[tuple[str, str], Result]], case: tuple[str, str]
) -> None:
    found = results[BASELINE][case]
    assert 0 < found["sums"]["clip/fraction"] < 1
    for name, gradient in found["gradients"].items():
        assert gradient.norm() > 0, f"{name} gets no gradient, so the comparison would prove nothing"


def test_no_two_algorithms_are_the_same_on_the_fixed_batch(
    results: dict[str, dict[tuple[str, str], Result]],
) -> None:
    """A preset whose settings did not arrive would repeat another one's gradient."""
    name = "model.embed_tokens.weight"
    gradients = {case: results[BASELINE][case]["gradients"][name] for case in CASES if case[0] == "llama"}
    pairs = [(a, b) for a in gradients for b in gradients if a < b]
    same = [(a, b) for a, b in pairs if torch.allclose(gradients[a], gradients[b], rtol=1e-4, atol=0)]
    # The two differ in their clamps alone, which this batch does not reach.
    assert same == [(("llama", "openrlhf"), ("llama", "paper"))]


def test_every_option_of_the_loss_takes_effect(results: dict[str, dict[tuple[str, str], Result]]) -> None:
    sums = results[BASELINE]["llama", "every_option"]["sums"]
    for name in ("loss/kl", "clip/dual_fraction", "importance/masked_fraction", "importance/truncated_fraction"):
        assert sums[name] > 0, name
    assert sums["loss/entropy"] < 0
