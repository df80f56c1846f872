"""Which ranks of a run import the user's reward function, and when."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import build
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.session_parts import open_rewards

ABSENT: dict[str, Any] = {"reward.kind": "function", "reward.function": "absent.py:f"}


def rank(*, is_leader: bool) -> ParallelContext:
    return cast(ParallelContext, SimpleNamespace(is_replica_leader=is_leader))


@pytest.mark.parametrize("asks", [ABSENT, {**ABSENT, "reward.kind": "math_answer", "data.evals.a.reward": "function"}])
def test_a_leader_tells_of_an_absent_function_before_the_models_and_no_other_rank_starts_a_process(
    asks: dict[str, Any],
) -> None:
    with ExitStack() as stack, pytest.raises(ConfigError, match=r"absent\.py cannot be imported"):
        open_rewards(build(asks), rank(is_leader=True), (), stack)
    with ExitStack() as stack:
        open_rewards(build(asks), rank(is_leader=False), (), stack)
