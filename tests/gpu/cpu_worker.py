"""Runs every body that CPU can run, tiny and with local layers: for tests/unit/gpu_scripts, as one rank.

    python -m tests.gpu.cpu_worker OUT

OUT/found.json says of each body `ok` or what it raised.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.gpu.site import Site, clean, open_site
from tests.gpu.test_colocated import sync_by_ipc
from tests.gpu.test_fp8_bytes import device_is_cpu
from tests.gpu.test_fp8_checkpoint import a_resumed_run_goes_on
from tests.gpu.test_fp8_scales import first_gradient_is_that_of_bfloat16
from tests.gpu.test_fp8_training import fp8_trains_as_bfloat16, policy_is_reference
from tests.gpu.test_groups import collectives_work
from tests.gpu.test_layer_specs import packed_is_padded, te_is_local
from tests.gpu.test_logprobs import fused_is_chunked
from tests.gpu.test_offload import offload_changes_nothing
from tests.gpu.test_profile import a_step_is_recorded
from tests.gpu.test_speed import ANYWHERE, changes_nothing


def kl_of_bfloat16(site: Site) -> None:
    policy_is_reference(site, site.config(site.llama()))


BODIES: dict[str, Callable[[Site], object]] = {
    "te_is_local": te_is_local,
    "packed_is_padded": packed_is_padded,
    "fp8_trains_as_bfloat16": partial(fp8_trains_as_bfloat16, recipe="none"),
    "policy_is_reference": kl_of_bfloat16,
    "first_gradient_is_that_of_bfloat16": partial(first_gradient_is_that_of_bfloat16, recipe="none"),
    "a_resumed_run_goes_on": partial(a_resumed_run_goes_on, recipe="none"),
    "device_is_cpu": device_is_cpu,
    "fused_is_chunked": fused_is_chunked,
    "offload_changes_nothing": offload_changes_nothing,
    "collectives_work": collectives_work,
    "sync_by_ipc": sync_by_ipc,
    "a_step_is_recorded": partial(a_step_is_recorded, kinds=("trace",)),
    **{name: partial(changes_nothing, change=change) for name, change in ANYWHERE.items()},
}


def main() -> None:
    out = Path(sys.argv[1])
    found = {}
    with open_site(out, is_tiny=True) as site:
        for name, body in BODIES.items():
            try:
                (out / name).mkdir()
                body(replace(site, folder=out / name))
                found[name] = "ok"
            except Exception:
                found[name] = traceback.format_exc()
            clean()
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
