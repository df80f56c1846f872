"""One rank: `python -m tests.launch.bootstrap_worker OUT RUN_DIR TENSOR PIPELINE DATA`.

Starts as a training rank does, talks to the others both ways, and writes what it saw to OUT/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.environment import find_job
from megatron_rpp.parallel.exchange import Exchange
from megatron_rpp.parallel.rendezvous_file import newest_rendezvous


def main() -> int:
    out, run_dir = Path(sys.argv[1]), sys.argv[2]
    tensor, pipeline, data = map(int, sys.argv[3:])
    try:
        parallel = bootstrap.initialize(ParallelConfig(tensor=tensor, pipeline=pipeline, data=data), 0, run_dir=run_dir)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    place = parallel.place
    saw: dict[str, Any] = {"launcher": place.launcher, "host": place.host, "attempt": place.attempt}
    saw |= {"local": [place.local_rank, place.local_world_size], "grid": [parallel.tp_rank, parallel.pp_rank]}
    saw |= {"interface": os.environ.get("GLOO_SOCKET_IFNAME"), "nccl": os.environ.get("NCCL_SOCKET_IFNAME")}
    total = torch.tensor([place.rank + 1.0])
    dist.all_reduce(total)
    saw["sum"] = total.item()
    saw["told"] = Exchange(parallel.store, place.rank, place.world_size, "test").gather("rank", place.rank, 30.0)
    found = newest_rendezvous(run_dir)
    saw["published"] = None if found is None else [found.attempt, found.host, found.address, found.world_size]
    saw["mpi"] = "mpi4py" in sys.modules and (found_job := find_job()) is not None and found_job.launcher == "mpi"
    dist.barrier()
    bootstrap.shutdown()
    (out / f"{place.rank}.json").write_text(json.dumps(saw))
    return 0


if __name__ == "__main__":
    sys.exit(main())
