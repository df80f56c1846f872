"""A server's process is started again whatever it died of, until the job ends or its user must act."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

KEEP = "import sys; from megatron_rpp.slurm import keep; keep._PAUSE_S = 0.05; sys.exit(keep.main(sys.argv[1:]))"


def kept(line: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", KEEP, "bash", "-c", line], cwd=folder, stderr=subprocess.DEVNULL)


def test_what_dies_is_started_again_and_told_of_the_end(tmp_path: Path) -> None:
    line = "echo x >> starts; [ $(wc -l < starts) = 3 ] || kill -9 $$; trap 'touch told; exit' TERM; sleep 60 & wait"
    process = kept(line, tmp_path)
    end = time.monotonic() + 30
    while not (tmp_path / "starts").exists() or (tmp_path / "starts").read_text() != "x\n" * 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)  # for the trap
    process.terminate()
    assert process.wait(30) == 0 and (tmp_path / "told").exists()


def test_a_users_mistake_is_not_repeated(tmp_path: Path) -> None:
    assert kept("echo x >> starts; exit 2", tmp_path).wait(30) == 2
    assert (tmp_path / "starts").read_text() == "x\n"
