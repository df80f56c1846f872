"""How many problems of a source are used, and that the log says what became of the others."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.json
import pyarrow.parquet
import pytest
from datasets import Dataset

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.data.problems import Tally, read_problems
from megatron_rpp.data.prompts import load_prompts
from tests.unit.data.test_prompts import Characters

GYM = SourceConfig(kind="reasoning_gym", task="chain_sum", size=3)


@pytest.fixture(params=["jsonl", "parquet", "huggingface", "two parquet files"])
def source(tmp_path: Path, request: pytest.FixtureRequest) -> SourceConfig:
    """Five problems with the pass rates 0, 0.25, ... 1."""
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(f'{{"prompt": "{i}", "answer": "0", "pass_rate": {i / 4}}}\n\n' for i in range(5)))
    rows = pyarrow.json.read_json(lines)
    if request.param == "huggingface":
        Dataset(rows).save_to_disk(tmp_path / "saved")
        return SourceConfig(kind="huggingface", path=str(tmp_path / "saved"))
    if request.param == "jsonl":
        return SourceConfig(path=str(lines))
    cut = 5 if request.param == "parquet" else 2
    for number, part in enumerate((rows.slice(0, cut), rows.slice(cut))):
        pyarrow.parquet.write_table(part, tmp_path / f"{number}.parquet")
    return SourceConfig(kind="parquet", path=str(tmp_path))


def counted(source: SourceConfig, **changes: Any) -> tuple[int, int, bool]:
    """(used, left out, whether more are left unread)"""
    found = Tally()
    used = list(read_problems(replace(source, **changes), DataConfig(), tally=found))
    assert len(used) == found.used
    return found.used, found.filtered, found.has_more


def test_a_source_tells_what_was_used_left_out_and_left_unread(source: SourceConfig) -> None:
    assert counted(source) == counted(source, size=5) == (5, 0, False)
    assert counted(source, size=2) == (2, 0, True)
    assert counted(source, min_pass_rate=0.5) == (3, 2, False)
    assert counted(source, min_pass_rate=0.5, size=2) == (2, 2, True)


def test_a_generated_source_has_nothing_left_unread() -> None:
    assert counted(GYM) == (3, 0, False)


def test_a_file_of_more_than_25_000_problems_is_used_whole_by_default_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_rpp"), "propagate", True)  # a rank's log turns it off
    path = tmp_path / "many.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}", "answer": "0"}}\n' for i in range(25_001)))
    many, few = SourceConfig(path=str(path)), SourceConfig(path=str(path), size=7)
    with caplog.at_level(logging.INFO, "megatron_rpp"):
        prompts = load_prompts(many, DataConfig(), Characters(), max_prompt_tokens=9)
        load_prompts(few, DataConfig(), Characters(), max_prompt_tokens=9, name="few")
    assert len(prompts) == 25_001 and prompts[-1].text == "25000"
    assert caplog.messages == [
        f"{path}: 25001 problems used, 0 left out by their pass rate",
        f"few ({path}): 7 problems used, 0 left out by their pass rate; more are left unread",
    ]
