"""memory.offload that could not act, or that is written wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_rpp.config import Config
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.validate import validate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory.offload": ("gradients", "gradients")}, "memory.offload=gradients,gradients names one twice"),
        (
            {"memory.offload": ("reference",), "algorithm.kl_coef": 0.0},
            "memory.offload=reference must go with a KL, such as algorithm.kl_coef=0.01",
        ),
        ({"memory.offload": ("weights",)}, "memory.offload"),
    ],
)
def test_the_error_names_the_setting(make: Callable[..., Config], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(make(changes), "train")


def test_everything_that_there_is_may_be_offloaded(make: Callable[..., Config]) -> None:
    validate(make({"memory.offload": ("optimizer", "gradients", "reference")}), "train")
    validate(make({"memory.offload": ("optimizer", "gradients"), "algorithm.kl_coef": 0.0}), "train")
