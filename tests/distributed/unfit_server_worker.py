"""A trainer of one rank, attached to two servers of which one cannot be verified. Arguments: model, OUT, both URLs.

OUT/result.json: after each step who serves, and what the product has warned of since the step before.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig, WeightSyncConfig
from megatron_rpp.model.build import build_model
from megatron_rpp.parallel import bootstrap
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.weight_sync.build import build_engine
from tests.support.warned import warnings_of

BACKOFF_S = 0.2
STEPS = 4
MENDED = 2  # the step before which the server is mended


def main() -> None:
    model, out, urls = sys.argv[1], Path(sys.argv[2]), tuple(sys.argv[3:])
    config = Config(
        model=ModelConfig(path=model),
        rollout=RolloutConfig(urls=urls, startup_deadline_s=60.0, max_retries=2, restart_backoff_s=BACKOFF_S),
        weight_sync=WeightSyncConfig(deadline_s=60.0, bucket_mb=1, transports=("broadcast",)),
    )
    parallel = bootstrap.initialize(ParallelConfig(), seed=0)
    policy = build_model(config, parallel, path=model)
    client = SGLangClient((), config.rollout, decode=lambda ids: "")
    engine = build_engine(config, policy, ServerFleet(config), client)
    engine.wait_ready()
    found = []
    for step in range(STEPS):
        if step == MENDED:
            (out / "wrong").unlink()
        with warnings_of("megatron_rpp") as warnings:
            engine.sync(step)
            synced = client.urls
            if step:  # not in the first, whose sync has tried it: how long ago that was, nobody knows
                time.sleep(4 * BACKOFF_S)  # longer than it is left out: it is tried again
                engine.with_retries(lambda _: None)
        found.append({"synced": synced, "sampled": client.urls, "warnings": warnings})
    engine.close()
    (out / "result.json").write_text(json.dumps(found))
    bootstrap.shutdown()
