"""A sync of a server that somebody else keeps busy: what weight_sync.pause makes of a request that is under way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, ModelConfig, WeightSyncConfig
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.parallel import bootstrap
from megatron_rpp.rollout import control
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.http import get_json, post_json
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.rollout.sglang_server import SGLangServer
from megatron_rpp.weight_sync.build import build_engine
from megatron_rpp.weight_sync.threads import in_thread

LONG = 240  # tokens, which take longer than a sync of the tiny model
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Iterator[Model]:
    """The tiny model on one rank, in this process."""
    config = Config(model=ModelConfig(path=str(tiny_model_dir)))
    parallel = bootstrap.initialize(config.parallel, config.run.seed)
    try:
        yield build_model(config, parallel, path=config.model.path)
    finally:
        bootstrap.shutdown()


@pytest.mark.parametrize("mode", ["abort", "retract", "drain"])
def test_a_request_that_is_under_way_ends_as_configured_and_the_sync_is_verified(
    mode: str, policy: Model, tiny_model_dir: Path, sglang_server: SGLangServer
) -> None:
    url = sglang_server.url
    config = Config(
        model=ModelConfig(path=str(tiny_model_dir)),
        rollout=RolloutConfig(urls=(url,), max_retries=0),
        weight_sync=WeightSyncConfig(transports=("broadcast",), pause=mode, deadline_s=DEADLINE_S),
    )
    engine = build_engine(config, policy, ServerFleet(config), SGLangClient((), config.rollout, decode=lambda ids: ""))
    try:
        engine.wait_ready()
        engine.sync(0)
        foreign = start_long_request(url)
        engine.sync(1)
        was_running = not foreign.done()
        assert engine.verify_weights() == [] and control.version(url, DEADLINE_S) == "1"
    finally:
        engine.close()
    reply: Any = foreign.result(DEADLINE_S)
    reason, tokens = reply["meta_info"]["finish_reason"]["type"], len(reply["output_ids"])
    if mode == "abort":
        assert reason == "abort" and tokens < LONG
    else:
        assert reason == "length" and tokens == LONG
        assert was_running == (mode == "retract"), "retract lets it go on with the new weights, drain awaits it"


def start_long_request(url: str) -> Future[dict[str, object]]:
    """It is running when this returns."""
    sampling = {"max_new_tokens": LONG, "ignore_eos": True, "temperature": 1.0}
    payload: dict[str, object] = {"input_ids": [3, 4, 5], "sampling_params": sampling}
    reply = in_thread(post_json, url, "generate", payload, DEADLINE_S)
    while True:
        assert not reply.done(), "it was too short"
        loads: Any = get_json(url, "v1/loads?include=core", DEADLINE_S)["loads"]
        if loads[0]["num_running_reqs"]:
            return reply
        time.sleep(0.01)
