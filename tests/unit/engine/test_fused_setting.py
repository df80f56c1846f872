"""What train.fused_logprobs means on a host, and in a job of several."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch._inductor.config
from torch._dynamo.exc import BackendCompilerFailed

from megatron_rpp import device
from megatron_rpp.device.compiler import why_no_kernels
from megatron_rpp.engine import score
from megatron_rpp.engine.score import uses_fused_logprobs
from megatron_rpp.parallel import fused_logprobs
from megatron_rpp.parallel.fused_logprobs import why_not_fused


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    uses_fused_logprobs.cache_clear()
    yield
    uses_fused_logprobs.cache_clear()
    why_no_kernels.cache_clear()


@pytest.mark.parametrize(
    ("setting", "has_cuda", "missing", "fused"),
    [
        ("off", True, None, False),
        ("on", False, None, True),
        ("auto", False, None, False),
        ("auto", True, None, True),
        ("auto", True, "no compiler", False),
    ],
)
def test_auto_is_for_gpus_with_a_compiler(
    monkeypatch: pytest.MonkeyPatch, setting: str, has_cuda: bool, missing: str | None, fused: bool
) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: has_cuda)
    monkeypatch.setattr(score, "why_not_fused", lambda: missing)
    assert uses_fused_logprobs(setting) is fused


def test_on_without_a_compiler_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a real search for one, on a host without any."""
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    why_no_kernels.cache_clear()
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with (
        no_compiler,
        pytest.raises(ValueError, match=r"train.fused_logprobs=on cannot be here: there is no C\+\+ compiler"),
    ):
        uses_fused_logprobs("on")


def test_auto_without_a_compiler_warns_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(score, "why_not_fused", lambda: "no compiler")
    for _ in range(3):
        uses_fused_logprobs("auto")
    assert caplog.text.count("log-probs are not fused") == 1


@pytest.mark.parametrize("kernel", ["_statistics", "_to_gradient"])
def test_a_compiler_that_is_there_and_fails_is_told_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """The first line of torch's error names the backend alone."""

    def fail(*_: Any) -> torch.Tensor:
        cause = RuntimeError("ptxas 12.0 does not know sm_90a\nand much more")
        raise BackendCompilerFailed(lambda: None, cause, None)

    def statistics(logits: torch.Tensor, rows: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.ones(4, len(rows))

    monkeypatch.setattr(fused_logprobs, "_statistics", statistics)
    monkeypatch.setattr(fused_logprobs, kernel, fail)
    assert why_not_fused() == "RuntimeError: ptxas 12.0 does not know sm_90a"
    with pytest.raises(ValueError, match="on cannot be here: RuntimeError: ptxas 12"):
        uses_fused_logprobs("on")


def test_a_rank_whose_kernels_run_does_without_them_where_another_ranks_do_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks of one TP group would otherwise compute parts of the same log-probs in two ways."""
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(score, "why_not_fused", lambda: None)
    monkeypatch.setattr(score, "gather_errors", lambda own: f"rank 3: no compiler, beside {own}")
    monkeypatch.setattr(score, "dist", SimpleNamespace(is_initialized=lambda: True))
    assert not uses_fused_logprobs("auto")
    assert "rank 3: no compiler, beside None" in caplog.text
    with pytest.raises(ValueError, match="on cannot be here: rank 3: no compiler"):
        uses_fused_logprobs("on")
