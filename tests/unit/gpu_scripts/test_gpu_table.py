"""`python -m tests.gpu` loses nothing to a file that cannot be imported, a crash, a lost GPU or a test that hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import __main__ as gpu_tests
from tests.gpu import preflight, table

REPOSITORY = Path(__file__).parents[3]
FILES = {
    "test_a_broken.py": "import no_such_package_of_a_host\n",
    "test_b_crash.py": (
        "import os, resource, time\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "def test_before(): pass\n"
        "def test_crash(): os.abort()\n"
        "def test_before_and_more(): assert False, 'as it should'\n"
        "def test_hang(): time.sleep(600)\n"
    ),
    "test_b_ends_between.py": "def test_last_word(): pass\ndef test_next(): pass\n",
    "conftest.py": (
        "import os, pytest\n"
        "@pytest.hookimpl(trylast=True)\n"
        "def pytest_runtest_logfinish(nodeid):\n"
        "    if nodeid.endswith('::test_last_word'): os._exit(3)\n"
    ),
    "test_c_lost.py": (
        "import sys, types\n"
        "def test_loses_the_gpu():\n"
        "    def wait_for_device(): raise RuntimeError('an illegal memory access')\n"
        "    sys.modules['megatron_rpp.device.memory'] = types.SimpleNamespace(wait_for_device=wait_for_device)\n"
        "    assert False\n"
        "def test_behind(): assert 'megatron_rpp.device.memory' not in sys.modules\n"
    ),
}
ENDS = {
    "test_a_broken.py": "not collected",
    "test_b_crash.py::test_before": "passed",
    "test_b_crash.py::test_crash": "crashed",
    "test_b_crash.py::test_before_and_more": "failed",
    "test_b_crash.py::test_hang": "crashed",
    "test_b_ends_between.py::test_last_word": "passed",
    "test_b_ends_between.py::test_next": "passed",
    "test_c_lost.py::test_loses_the_gpu": "failed",
    "test_c_lost.py::test_behind": "passed",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[dict[str, str]]]:
    folder, out = tmp_path_factory.mktemp("tests"), tmp_path_factory.mktemp("out") / "results"
    for name, text in FILES.items():
        (folder / name).write_text(text)
    program = (
        f"import sys, pathlib; from tests.gpu.__main__ import main; sys.exit(main(None, pathlib.Path('{folder}')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--out", str(out), "--limit", "8"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done, [event for event in table.read(out) if event["event"] == "end"]


def test_every_test_ends_once_whatever_the_others_do(ended: tuple[object, list[dict[str, str]]]) -> None:
    names = [event["name"].rpartition("/")[2] for event in ended[1]]
    assert sorted(names) == sorted(ENDS)
    assert {name: event["outcome"] for name, event in zip(names, ended[1], strict=True)} == ENDS


def test_a_line_says_why(ended: tuple[subprocess.CompletedProcess[str], list[dict[str, str]]]) -> None:
    done, ends = ended
    reasons = {event["name"].rpartition("::")[2].rpartition("/")[2]: event["reason"] for event in ends}
    assert "No module named 'no_such_package_of_a_host'" in reasons["test_a_broken.py"]
    assert reasons["test_crash"] == "signal 6" and reasons["test_hang"] == "over 8 s"
    assert "as it should" in done.stdout and done.returncode == 1
    assert done.stdout.rstrip().endswith("1 not collected, 4 passed, 2 crashed, 2 failed")


def test_without_a_gpu_every_test_is_skipped_with_the_reason() -> None:
    """And a plain `pytest` does not collect them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if " s  skipped  test_" in line]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) > 20 and all(line.endswith("(Skipped: no CUDA GPU)") for line in lines), done.stdout
    assert done.stdout.rstrip().endswith(f"{len(lines)} skipped")
    files = list(dict.fromkeys(line.split()[3].partition("::")[0] for line in lines))
    assert files[:4] == ["test_layer_specs.py", "test_families.py", "test_fp8_bytes.py", "test_fp8_served.py"]


def test_a_package_that_is_missing_is_named_with_who_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "WANTED", {"json": "nobody", "no_such_package": "servers"})
    assert preflight.missing(["json", "no_such_package"]) == ["no_such_package"]
    monkeypatch.setattr(preflight, "missing", lambda: ["no_such_package"])
    assert preflight.line() == "missing on this host: no_such_package (servers); see docs/gpu.md"


def test_a_name_that_fits_no_test_is_no_success(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    assert gpu_tests.main(["-k", "two"], folder=tmp_path) == 1
    assert capfd.readouterr().out.rstrip().endswith("no test")


def test_a_file_that_never_ends_its_import_is_cut_off(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tests, "COLLECTION_S", 2.0)
    (tmp_path / "test_one.py").write_text("import time\ntime.sleep(600)\n")
    assert gpu_tests.main(["--limit", "1"], folder=tmp_path) == 1
    assert "pytest itself has ended before any test: too long" in capfd.readouterr().out


def test_a_test_that_ends_as_its_process_is_killed_is_not_blamed_nor_is_the_next(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    table.write(journal, event="start", name="a")
    seen = gpu_tests._last(journal)
    assert gpu_tests._to_blame(journal, seen) == "a"
    table.write(journal, event="end", name="a")
    assert gpu_tests._to_blame(journal, seen) is None
    table.write(journal, event="start", name="b")
    assert gpu_tests._to_blame(journal, seen) is None


def test_a_line_that_was_cut_off_is_not_read(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    table.write(journal, event="start", name="a")
    with journal.open("a") as file:
        file.write(json.dumps({"event": "end"})[:5])
    assert table.read(journal) == [{"event": "start", "name": "a"}]
