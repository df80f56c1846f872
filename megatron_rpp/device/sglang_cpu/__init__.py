"""What an unpatched SGLang needs to run where there is no CUDA; for the server process only.

`for_X/` holds an inert stand-in for package X, which SGLang imports and, on CPU, never calls.
A stand-in is put on the server's path only where the real package is not installed.
`plugin/` uses SGLang's own plugin hook and model registry: per-sample seeds on CPU, a quicker start.
Nothing here is ever imported by the trainer but this file.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).resolve().parent
STAND_INS = ("triton", "torchvision", "sgl_kernel")
MODEL_PACKAGE = "rpp_sglang_cpu.models"


def python_path() -> list[str]:
    """Folders for the front of the server process's PYTHONPATH."""
    missing = [name for name in STAND_INS if find_spec(name) is None]
    return [str(_HERE / "plugin"), *(str(_HERE / f"for_{name}") for name in missing)]
