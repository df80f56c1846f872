"""What an SGLang server does with weights, in few plain lines that share nothing with the package: for the receiver."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# server parameter: the HF tensors that it is, one behind the other
_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_EXPERT = re.compile(r"(?P<layer>.*\.experts)\.(?P<e>\d+)\.(?P<leaf>\w+)\.weight")
_WIDTH, _VOCABULARY = 32, 64  # SGLang's multiples on CPU


def tensor_bucket() -> ModuleType:
    """SGLang's tensor_bucket.py alone; importing the package would take seconds."""
    package = importlib.util.find_spec("sglang")
    assert package is not None and package.submodule_search_locations, "sglang is not installed"
    path = f"{package.submodule_search_locations[0]}/srt/weight_sync/tensor_bucket.py"
    spec = importlib.util.spec_from_file_location("sglang_tensor_bucket", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer_skipper() -> Callable[[str, list[str]], bool]:
    """SGLang's is_layer_skipped(module, what modules_to_not_convert says) alone; its file imports kernels."""
    package = importlib.util.find_spec("sglang")
    assert package is not None and package.submodule_search_locations, "sglang is not installed"
    path = Path(package.submodule_search_locations[0], "srt/layers/quantization/utils.py")
    wanted = ("_module_path_match", "_FALLBACK_FUSED_SHARDS", "is_layer_skipped")
    tree = ast.parse(path.read_text())
    names = {id(node): getattr(node, "name", getattr(getattr(node, "target", None), "id", "")) for node in tree.body}
    tree.body = [node for node in tree.body if isinstance(node, ast.ImportFrom) or names[id(node)] in wanted]
    tree.body = [node for node in tree.body if not getattr(node, "module", "").startswith("sglang")]
    found: dict[str, Any] = {}
    exec(compile(tree, str(path), "exec"), found)
    return cast(Callable[[str, list[str]], bool], found["is_layer_skipped"])


def custom_process_group(
    master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
) -> ProcessGroup:
    """The group that SGLang's init_custom_process_group makes on TP rank 0, by the same calls of torch."""
    from torch.distributed.distributed_c10d import _new_process_group_helper, _world, default_pg_timeout

    url = f"tcp://{master_address}:{master_port}"
    store, _, _ = next(torch.distributed.rendezvous(url, rank_offset, world_size, timeout=default_pg_timeout))
    group, _ = _new_process_group_helper(
        world_size,
        rank_offset,
        [],
        torch.distributed.Backend(backend),
        torch.distributed.PrefixStore(group_name, store),
        group_name=group_name,  # type: ignore[arg-type]
        timeout=default_pg_timeout,
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def server_checksums(tensors: dict[str, Tensor]) -> dict[str, str]:
    """What `/weights_checker` of an untied server on CPU at TP 1 reports that has loaded these HF tensors."""
    return {
        name: hashlib.sha256(bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())).digest()[:8].hex()
        for name, tensor in server_parameters(tensors).items()
    }


def server_parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the server's names: projections joined, experts stacked, MLPs and vocabulary padded with zeros."""
    padded = {name: _padded(name, tensor) for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in padded.items() if not _EXPERT.fullmatch(name)}
    for joined, parts in _JOINED.items():
        for first in [name for name in found if f".{parts[0]}." in name]:
            names = [first.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if all(name in found for name in names):
                found[first.replace(f".{parts[0]}.", f".{joined}.")] = torch.cat([found.pop(name) for name in names])
    return found | _experts(padded)


def _experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """w13 [experts, gate and up, hidden] and w2 [experts, hidden, width] of every layer."""
    layers: dict[str, int] = {}
    for name in tensors:
        if match := _EXPERT.fullmatch(name):
            layers[match["layer"]] = max(layers.get(match["layer"], 0), int(match["e"]) + 1)
    found = {}
    for layer, count in layers.items():
        is_mixtral = f"{layer}.0.w1.weight" in tensors
        gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        of = lambda leaf, e, layer=layer: tensors[f"{layer}.{e}.{leaf}.weight"]  # noqa: E731
        found[f"{layer}.w13_weight"] = torch.stack([torch.cat([of(gate, e), of(up, e)]) for e in range(count)])
        found[f"{layer}.w2_weight"] = torch.stack([of(down, e) for e in range(count)])
    return found


def _padded(name: str, tensor: Tensor) -> Tensor:
    leaf = name.split(".")[-2]
    if leaf in ("embed_tokens", "lm_head"):
        return _to_multiple(tensor, 0, _VOCABULARY)
    if leaf in ("gate_proj", "up_proj", "w1", "w3"):
        return _to_multiple(tensor, 0, _WIDTH)
    return _to_multiple(tensor, 1, _WIDTH) if leaf in ("down_proj", "w2") else tensor


def _to_multiple(tensor: Tensor, dim: int, multiple: int) -> Tensor:
    shape = [*tensor.shape]
    shape[dim] = -shape[dim] % multiple
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
