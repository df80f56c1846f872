"""SGLang's own model classes, loaded and hashed by its weight checker: no server, no KV cache, no forward pass.

Arguments: result file, JSON list of [TP size, dtype, model directory]. The result is JSON: the checker's reports, by
rank, a directory. SGLang is imported once, and each rank of each model is a fork of that process.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from sglang.benchmark import one_batch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
from sglang.srt.distributed import bootstrap
from sglang.srt.model_loader import get_model
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.weight_checker import WeightChecker


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def report(folder: str, dtype: str, tp_size: int, rank: int, port: int) -> dict[str, Any]:
    """What rank `rank` of a server of `folder` would answer to /weights_checker."""
    args = ServerArgs(
        model_path=folder,
        device="cpu",
        dtype=dtype,
        tp_size=tp_size,
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        max_total_tokens=1000,
        skip_tokenizer_init=True,
        dist_init_addr=f"127.0.0.1:{port}",
    )
    args.resolve_once()
    world = one_batch.spawn_world_rank(args, tp_rank=rank, pp_rank=0)
    one_batch.publish(args, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=world, gpu_id=rank))
    one_batch._init_process_global_configs()
    config = ModelConfig.from_server_args(args)
    bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=config)
    load = LoadConfig(load_format="auto")
    config = adjust_config_with_unaligned_cpu_tp(config, load, tp_size)
    model = get_model(model_config=config, load_config=load, device_config=DeviceConfig("cpu", rank))
    answer = WeightChecker(get_model=lambda: model).handle("checksum", role="target")
    torch.distributed.barrier()  # a rank that ended early would break its peers' connections
    return dict(answer or {})


def in_fork(out: Path, folder: str, dtype: str, tp_size: int, rank: int, port: int) -> int:
    """Process id of a fork that writes `report` to `out`."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        out.write_text(json.dumps(report(folder, dtype, tp_size, rank, port)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    out = Path(sys.argv[1])
    ModelRegistry.get_supported_archs()  # imports every model, once for all forks
    result: dict[str, list[dict[str, Any]]] = {}
    for tp_size, dtype, folder in json.loads(sys.argv[2]):
        port = free_port()
        files = [out.with_suffix(f".{rank}") for rank in range(tp_size)]
        forks = [in_fork(file, folder, dtype, tp_size, rank, port) for rank, file in enumerate(files)]
        ends = [os.waitpid(pid, 0)[1] for pid in forks]
        if any(ends):
            sys.exit(f"{folder}: a rank ended with an error, printed above")
        result[folder] = [json.loads(file.read_text()) for file in files]
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
