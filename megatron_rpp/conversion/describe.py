"""What a checkpoint directory holds, by its headers alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rpp.conversion.megatron_reader import MegatronTensors
from megatron_rpp.device import dtype_name
from megatron_rpp.model.hf_io.tensors import HFTensors
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.load_megatron import is_megatron_directory

_WEIGHTS = (".safetensors", ".bin", ".distcp")


@dataclass(frozen=True)
class Stored:
    """One tensor under its stored name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str  # or how many, where it is stored in parts


def describe(path: str, *, allow_pickle: bool = False) -> tuple[list[tuple[str, str]], list[Stored]]:
    """((heading, text) lines, the tensors). ValueError where the directory is neither kind, or damaged."""
    folder = Path(path)
    is_megatron = is_megatron_directory(folder)
    tensors = list(_megatron(path) if is_megatron else _hugging_face(path, allow_pickle))
    files = [file for file in folder.iterdir() if file.suffix in _WEIGHTS]
    size = sum(file.stat().st_size for file in files)
    dtypes = Counter[torch.dtype]()
    for tensor in tensors:
        dtypes[tensor.dtype] += math.prod(tensor.shape)
    lines = [("format", "Megatron torch_dist" if is_megatron else "Hugging Face"), *_config(folder)]
    lines += [
        ("parameters", f"{sum(dtypes.values()):,} in {len(tensors)} tensors"),
        ("dtype", ", ".join(f"{dtype_name(dtype)} {count:,}" for dtype, count in dtypes.most_common())),
        ("fp8", "yes" if any("float8" in str(dtype) for dtype in dtypes) else "no"),
        ("files", f"{len(files)}, {size / 1e9:.3f} GB"),
    ]
    return lines, tensors


def _config(folder: Path) -> Iterator[tuple[str, str]]:
    if not (folder / "config.json").is_file():
        yield "config", "none here; conversion and compare need --hf DIR"
        return
    hf = read_hf_config(str(folder), "DIR")
    yield "architecture", hf.architecture
    yield "layers", str(hf.num_layers)
    heads = f"{hf.num_attention_heads} heads of {hf.head_dim}, {hf.num_query_groups} key-value groups"
    yield "shape", f"hidden {hf.hidden_size}, ffn {hf.ffn_hidden_size}, {heads}, vocabulary {hf.vocab_size}"
    if hf.moe is not None:
        yield "experts", f"{hf.moe.num_experts}, {hf.moe.top_k} a token, ffn {hf.moe.ffn_hidden_size}"
    yield "tied", "yes" if hf.tied_embeddings else "no"
    asked = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if asked:
        yield "quantization", str(asked.get("quant_method", asked))


def _hugging_face(path: str, allow_pickle: bool) -> Iterator[Stored]:
    tensors = HFTensors(path, allow_pickle=allow_pickle)
    for name in tensors.names:
        yield Stored(name, tensors.stored_dtype(name), tuple(tensors.shape(name)), tensors.file_of(name))


def _megatron(path: str) -> Iterator[Stored]:
    stored = MegatronTensors(path)
    for key, tensor in stored.tensors.items():
        yield Stored(key, tensor.properties.dtype, tuple(tensor.size), f"{len(tensor.chunks)} parts")
