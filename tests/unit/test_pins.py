"""What the extra `gpu` installs is what tests look at here, and no file pins another release."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[\w,]+\])?==([\w.]+)")


def pins(*lines: str) -> dict[str, str]:
    """name -> version, of lines that name one."""
    found = (PIN.match(line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def of_file(name: str) -> dict[str, str]:
    return pins(*(ROOT / "requirements" / name).read_text().splitlines())


def of_setup(keyword: str) -> ast.expr:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    return next(argument.value for argument in call.keywords if argument.arg == keyword)


def test_gpu_hosts_get_the_engine_whose_classes_are_tested_and_the_sglang_whose_server_is() -> None:
    gpu = pins(*ast.literal_eval(of_setup("extras_require"))["gpu"])
    assert gpu["transformer-engine"] == of_file("te-python.txt")["transformer-engine"]
    assert gpu["sglang"] == of_file("no-deps.txt")["sglang"]


def test_both_megatrons_are_within_what_the_package_asks_for() -> None:
    """Or pip would refuse the extra, or `make setup` break its own environment."""
    (wanted,) = (x for x in ast.literal_eval(of_setup("install_requires")) if x.startswith("megatron-core"))
    least, below = (
        tuple(map(int, part.split("."))) for part in re.findall(r"[\d.]+", wanted.removeprefix("megatron-core"))
    )
    gpu = pins(*ast.literal_eval(of_setup("extras_require"))["gpu"])["megatron-core"]
    for version in (gpu, of_file("cpu.txt")["megatron-core"]):
        assert least <= tuple(map(int, version.split("."))) < below


def test_docs_name_the_releases_that_are_pinned() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    gpu = pins(*ast.literal_eval(of_setup("extras_require"))["gpu"])
    named = [
        f"SGLang {gpu['sglang']}",
        f"Transformer Engine {gpu['transformer-engine']}",
        f"megatron-core {gpu['megatron-core']}",
    ]
    assert all(name in text for name in [*named, f"sglang=={gpu['sglang']}"])
