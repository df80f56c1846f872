"""The test cluster: started once a session, when the first test asks for it. Where it cannot start, tests fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import REPOSITORY, Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Five nodes of 8 CPUs and 2 (fake) GPUs, on a network of their own."""
    made = Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=5)
    yield made
    made.close()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `examples/make_demo.py` writes: init/ and train.jsonl among others."""
    out = tmp_path_factory.mktemp("demo")
    make = [sys.executable, "examples/make_demo.py", "--out", str(out), "--demonstrations", "1"]
    subprocess.run(make, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return out
