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

from megatron_rpp.model.hf_io.fp8_blocks import quantize
from tests.gpu.site import Site, clean, open_site
from tests.gpu.test_colocated import sync_by_ipc
from tests.gpu.test_fp8_bytes import a_weight, assert_same
from tests.gpu.test_fp8_checkpoint import a_resumed_run_goes_on
from tests.gpu.test_fp8_training import fp8_trains_as_bfloat16, policy_is_reference
from tests.gpu.test_groups import collectives_work
from tests.gpu.test_layer_specs import packed_is_padded, te_is_local
from tests.gpu.test_logprobs import fused_is_chunked
from tests.gpu.test_offload import offload_changes_nothing


def kl_of_bfloat16(site: Site) -> None:
    policy_is_reference(site, site.config(site.llama()))


def bytes_of_cpu(site: Site) -> None:
    assert_same(site, quantize(a_weight(site), power_of_two=True))


BODIES: dict[str, Callable[[Site], None]] = {
    "te_is_local": te_is_local,
    "packed_is_padded": packed_is_padded,
    "fp8_trains_as_bfloat16": partial(fp8_trains_as_bfloat16, recipe="none"),
    "policy_is_reference": kl_of_bfloat16,
    "a_resumed_run_goes_on": partial(a_resumed_run_goes_on, recipe="none"),
    "bytes": bytes_of_cpu,
    "fused_is_chunked": fused_is_chunked,
    "offload_changes_nothing": offload_changes_nothing,
    "collectives_work": collectives_work,
    "sync_by_ipc": sync_by_ipc,
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
