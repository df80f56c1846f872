"""Packages that the GPU tests want of a host and that are easily missing there: named before the first test.

What a missing one stops is a line of the table, too; here they stand together, since a host without network takes
minutes to be given a package.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

WANTED: dict[str, str] = {  # module: who imports it
    "transformer_engine": "model.layer_spec=te",
    "einops": "Transformer Engine",
    "onnx": "Transformer Engine",
    "onnxscript": "Transformer Engine",
    "packaging": "Transformer Engine",
    "pydantic": "Transformer Engine",
    "importlib_metadata": "Transformer Engine",
    "triton": "compiled log-probs",
    "megatron": "the trainer",
    "numpy": "the trainer",
    "transformers": "the trainer",
    "tokenizers": "the trainer",
    "safetensors": "the trainer",
    "jinja2": "the trainer",
    "rich": "the trainer",
    "aiohttp": "requests to servers",
    "requests": "requests to servers",
    "psutil": "servers that are started",
    "sympy": "rewards",
    "tensorboard": "metrics of a run",
}


def missing(modules: Collection[str] = WANTED) -> list[str]:
    """Those that cannot be found; none is imported."""
    return [name for name in modules if find_spec(name) is None]


def line() -> str:
    """For the head of the table."""
    absent = ", ".join(f"{name} ({WANTED[name]})" for name in missing())
    return f"missing on this host: {absent}; see docs/gpu.md" if absent else "no package is missing"
