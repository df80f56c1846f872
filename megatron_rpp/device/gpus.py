"""What this host's GPUs are, for checks before a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class GPU:
    """One that this process sees."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]  # CUDA's compute capability

    @property
    def has_float8(self) -> bool:
        """FP8 matrix products, from Ada and Hopper on."""
        return self.capability >= (8, 9)


def gpus() -> list[GPU]:
    """All that this process sees; none on CPU."""
    if not torch.cuda.is_available() or getattr(torch.cuda, "_rpp_cpu", False):
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [GPU(each.name, each.total_memory, (each.major, each.minor)) for each in found]


def software() -> dict[str, str]:
    """Versions of what stands between torch and its GPUs: {"CUDA": ..., "NCCL": ..., "driver": ...}; none on CPU."""
    found = {"driver": driver_version()}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if torch.version.cuda and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {name: version for name, version in found.items() if version}


def package_version(name: str) -> str:
    """Of an installed package; empty where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def driver_version() -> str:
    """NVIDIA's kernel driver, such as 550.54.15; empty where there is none."""
    try:
        text = _DRIVER.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    version = re.search(r"\d+\.\d+(\.\d+)?", text.partition("\n")[0])
    return version[0] if version else ""
