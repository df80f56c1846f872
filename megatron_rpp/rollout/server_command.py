"""Command line and environment of one SGLang server; pure functions of the configuration."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_rpp.config.allocator import for_server
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.device import SET_HERE, sglang_cpu
from megatron_rpp.model.hf_io import fp8_blocks
from megatron_rpp.parallel.interfaces import choose_interfaces

HOST = "127.0.0.1"

# Set by torchrun, mpirun or srun for the process that starts the server: torch.distributed in there would join
# that job, and what asks for its rank by SLURM's or MPI's variables would get a wrong one.
_TRAINER_ONLY = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_TRAINER_ONLY_PREFIXES = (
    *("TORCHELASTIC_", "MASTER_", "ROLE_", "RPP_"),
    *("SLURM_", "PMI_", "PMI2_", "PMIX_", "OMPI_", "MPI_", "HYDI_"),
)

CPU_FLAGS = (
    *("--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch"),
    *("--grammar-backend", "none"),
    *("--cuda-graph-backend-decode", "disabled"),
    *("--cuda-graph-backend-prefill", "disabled"),
    "--skip-server-warmup",
    "--sleep-on-idle",  # an idle scheduler would take half a core from the trainer
    "--enable-deterministic-inference",  # per-sample seeds; see device/sglang_cpu/plugin
)


def server_command(
    model_path: str,
    rollout: RolloutConfig,
    dtype: str,
    device: str,
    port: int,
    *,
    host: str = HOST,
    trust_remote_code: bool = False,
    base_gpu: int = 0,
    weight_loader: str | None = None,
    bf16_layers: Collection[int] = (),
) -> list[str]:
    """The command; `rollout.server_args` come last, so that they win. Raises ConfigError for float8 on CPU.

    bf16_layers: those that are not float8 where the others are.
    """
    command = [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", model_path),
        *("--host", host, "--port", str(port)),
        *("--device", device),
        *_weight_flags(model_path, dtype, device, bf16_layers),
        *("--tp-size", str(rollout.server_tensor)),
        *("--context-length", str(rollout.context_length)),
        "--skip-tokenizer-init",  # token ids go in and come out; the trainer decodes
    ]
    if trust_remote_code:
        command.append("--trust-remote-code")
    if weight_loader is not None:
        command += ["--custom-weight-loader", weight_loader]
    if device == "cpu":
        # Without a limit the KV cache takes all memory.
        command += [*CPU_FLAGS, "--max-total-tokens", str(max(rollout.max_total_tokens, rollout.context_length))]
    else:
        # Fused into the routed experts, shared ones could not be compared with the trainer's (weight_sync).
        command += ["--base-gpu-id", str(base_gpu), "--disable-shared-experts-fusion"]
        if rollout.release_memory:  # on CPU there is no memory saver: SGLang would die of its missing package
            command.append("--enable-memory-saver")
    return [*command, *rollout.server_args]


def _weight_flags(model_path: str, dtype: str, device: str, bf16_layers: Collection[int]) -> list[str]:
    """The type of the weights; and none are loaded where the first sync must bring them."""
    if dtype == "float8":
        if device == "cpu":
            raise ConfigError(
                "weight_sync.dtype=float8 needs servers on GPUs: SGLang has no FP8 kernels for CPUs here; "
                "choose auto, float32 or bfloat16"
            )
        override = json.dumps({"quantization_config": fp8_blocks.quantization_config(bf16_layers)})
        return ["--dtype", "bfloat16", "--load-format", "dummy", "--json-model-override-args", override]
    if not any(Path(model_path).glob("*.safetensors")) and not any(Path(model_path).glob("*.bin")):
        return ["--dtype", dtype, "--load-format", "dummy"]  # a Megatron directory
    return ["--dtype", dtype]


def server_environment(
    base: Mapping[str, str],
    rollout: RolloutConfig,
    device: str,
    host: str = HOST,
    model_package: str | None = None,
) -> dict[str, str]:
    """`base` without the rank in it, or what was set for ranks, and as config.allocator wants it; on CPU with the
    stand-ins and one thread a rank.

    host: the address that the server listens on; trainers on other hosts reach its weight-update groups there, too.
    model_package: modules of model classes that go before SGLang's own.
    """
    env = {
        name: value
        for name, value in for_server(base, rollout).items()
        if name not in _TRAINER_ONLY and not name.startswith(_TRAINER_ONLY_PREFIXES) and SET_HERE.get(name) != value
    }
    env["PYTHONUNBUFFERED"] = "1"  # the log's last lines matter when the server dies
    env.setdefault("HF_HUB_OFFLINE", "1")  # the model is a local directory
    choose_interfaces(host, env)
    if device == "cpu":
        env |= _cpu_environment(env.get("PYTHONPATH", ""), rollout.server_tensor)
    if model_package is not None:
        env["SGLANG_EXTERNAL_MODEL_PACKAGE"] = model_package
    return env


def _cpu_environment(python_path: str, tp_size: int) -> dict[str, str]:
    folders = [*sglang_cpu.python_path(), *filter(None, [python_path])]
    return {
        "PYTHONPATH": os.pathsep.join(folders),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_EXTERNAL_MODEL_PACKAGE": sglang_cpu.MODEL_PACKAGE,
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank) for rank in range(tp_size)),
        "OMP_NUM_THREADS": "1",  # more threads on busy cores are many times slower
        "TORCHDYNAMO_DISABLE": "1",  # torch.compile would start a C++ compiler at the first request
    }
