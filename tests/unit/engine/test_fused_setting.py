"""What train.fused_logprobs means on a host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch._inductor.config

from megatron_rpp import device
from megatron_rpp.device.compiler import why_no_kernels
from megatron_rpp.engine import score
from megatron_rpp.engine.score import uses_fused_logprobs


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
    monkeypatch.setattr(score, "why_no_kernels", lambda: missing)
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
    monkeypatch.setattr(score, "why_no_kernels", lambda: "no compiler")
    for _ in range(3):
        uses_fused_logprobs("auto")
    assert caplog.text.count("log-probs are not fused") == 1
