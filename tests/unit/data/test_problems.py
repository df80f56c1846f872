"""Problems from JSONL, parquet and saved datasets: what is read, filtered and refused, and how errors name it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.config.ranges import CHOICES
from megatron_rpp.data.preflight import check_problems
from megatron_rpp.data.problems import _READERS, Problem, read_problems

ROWS: list[dict[str, Any]] = [
    {"prompt": f"{i}+{i}", "answer": str(2 * i), "pass_rate": i / 4, "solver": {"right": i, "of": 4}} for i in range(5)
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
VERL = {"prompt": CHAT, "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"question": "1+1"}}


def write(tmp_path: Path, kind: str, rows: list[dict[str, Any]]) -> SourceConfig:
    """A source of `kind` that holds `rows`."""
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    return SourceConfig(kind=kind, path=str(path))


def read(
    source: SourceConfig, *, needs_answer: bool = True, needs_pass_rate: bool = False, **data: Any
) -> list[Problem]:
    return list(read_problems(source, DataConfig(**data), needs_answer=needs_answer, needs_pass_rate=needs_pass_rate))


def change(source: SourceConfig, **changes: Any) -> SourceConfig:
    return SourceConfig(**{**vars(source), **changes})


KINDS = pytest.mark.parametrize("kind", ["jsonl", "parquet", "huggingface"])


@KINDS
def test_every_kind_gives_the_same_problems(tmp_path: Path, kind: str) -> None:
    problems = read(write(tmp_path, kind, ROWS), prompt_template="{prompt} of {solver[of]}=")
    assert [p.text for p in problems] == [f"{i}+{i} of 4=" for i in range(5)]
    assert [p.answer for p in problems] == ["0", "2", "4", "6", "8"]
    assert [p.metadata for p in problems] == ROWS and not any(p.turns for p in problems)
    assert {p.pass_rate for p in problems} == {None}, "nobody asked"


@KINDS
def test_the_filter_keeps_the_first_size_problems_within_its_bounds(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path, kind, ROWS)
    kept = read(change(source, min_pass_rate=0.25, max_pass_rate=0.75))
    assert [p.pass_rate for p in kept] == [0.25, 0.5, 0.75]
    kept = read(change(source, min_pass_rate=0.5, size=2))
    assert [p.text for p in kept] == ["2+2", "3+3"]
    with pytest.raises(ValueError, match=r"none of its 5 problems has a `solver.right` from 0.9 to 0.95; widen"):
        rows = [{**row, "solver": {"right": row["pass_rate"]}} for row in ROWS]
        source = write(tmp_path, kind, rows) if kind != "huggingface" else write(tmp_path / "other", kind, rows)
        read(change(source, pass_rate_key="solver.right", min_pass_rate=0.9, max_pass_rate=0.95))


@KINDS
def test_a_row_that_lacks_what_is_needed_is_named(tmp_path: Path, kind: str) -> None:
    rows = [*ROWS, {"prompt": "x", "answer": None, "pass_rate": None, "solver": None}]
    source = write(tmp_path, kind, rows)
    place = {"jsonl": ":6: ", "parquet": ": row 5: ", "huggingface": ": row 5: "}[kind]
    with pytest.raises(ValueError, match=rf"{source.path}{place}`answer` must be text or a number, not null"):
        read(source)
    assert [p.answer for p in read(source, needs_answer=False)] == ["0", "2", "4", "6", "8", ""]
    with pytest.raises(ValueError, match=rf"{source.path}{place}`pass_rate` must be the problem's pass rate, .* None"):
        read(source, needs_pass_rate=True)
    with pytest.raises(ValueError, match=rf"{source.path}{place}`answer`, which data.prompt_template names, is null"):
        read(source, needs_answer=False, prompt_template="{answer}")


@KINDS
def test_a_conversation_is_asked_as_it_is_with_the_template_in_its_last_turn(tmp_path: Path, kind: str) -> None:
    source = change(write(tmp_path, kind, [VERL]), answer_key="reward_model.ground_truth")
    [problem] = read(source, chat_template=True, prompt_template="{prompt}\nUse {{braces}}.")
    assert problem.turns == (CHAT[0], {"role": "user", "content": "1+1\nUse {braces}."})
    assert problem.text == "system: Be brief.\n\nuser: 1+1\nUse {braces}." and problem.answer == "2"
    [plain] = read(source, prompt_template="{extra_info[question]}=")
    assert plain.text == "1+1=" and plain.turns == ()
    with pytest.raises(ValueError, match=r"`prompt` is a conversation; set data\.chat_template=true"):
        read(source)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "a.jsonl:1: the conversation is empty"),
        ([*CHAT, {"role": "assistant", "content": "2"}], "a.jsonl:1: the conversation ends with the assistant's turn"),
        ([{"role": "user"}], "a.jsonl:1: turn 1 of the conversation needs a `role` and a `content`"),
        ([CHAT[0], {"role": "user", "content": [{"type": "image"}]}], "a.jsonl:1: turn 2 of the conversation needs"),
        ([{}], "a.jsonl:1: turn 1 of the conversation needs"),
    ],
)
def test_a_conversation_that_cannot_be_asked_is_refused(tmp_path: Path, turns: list[Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": turns, "answer": "2"}))
    with pytest.raises(ValueError, match=message):
        read(SourceConfig(path=str(path)), chat_template=True)


def test_a_list_that_is_no_conversation_is_text_as_a_questions_choices_are(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "choices": ["2", "3"], "answer": "2"}]
    [problem] = read(write(tmp_path, "jsonl", rows), prompt_template="{question} {choices}")
    assert problem.text == "1+1? ['2', '3']" and problem.turns == ()


def test_a_users_only_turn_reads_as_its_text(tmp_path: Path) -> None:
    [problem] = read(write(tmp_path, "parquet", [{"prompt": CHAT[1:], "answer": "2"}]), chat_template=True)
    assert problem.text == "1+1" and problem.turns == (CHAT[1],)


def test_a_key_that_is_written_with_a_dot_wins_over_a_nested_one(tmp_path: Path) -> None:
    rows = [{"prompt": "1", "a.b": "flat", "a": {"b": "nested"}}]
    assert read(change(write(tmp_path, "jsonl", rows), answer_key="a.b"))[0].answer == "flat"
    with pytest.raises(ValueError, match=r"rows.jsonl:1: no `c`; the object has `b`"):
        read(change(write(tmp_path, "jsonl", rows), answer_key="a.c"))


def test_a_folder_of_parquet_files_is_read_by_name_and_a_pattern_chooses(tmp_path: Path) -> None:
    for name, rows in {"train-1": ROWS[2:4], "train-0": ROWS[:2], "test-0": ROWS[4:]}.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    folder = SourceConfig(kind="parquet", path=str(tmp_path))
    assert [p.answer for p in read(folder)] == ["8", "0", "2", "4", "6"]
    assert [p.answer for p in read(change(folder, path=f"{tmp_path}/train-*.parquet"))] == ["0", "2", "4", "6"]


def test_a_split_of_a_saved_dataset_must_be_chosen(tmp_path: Path) -> None:
    splits = {"train": Dataset.from_list(ROWS[:3]), "test": Dataset.from_list(ROWS[3:])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = SourceConfig(kind="huggingface", path=str(tmp_path / "saved"))
    assert [p.answer for p in read(change(source, split="test"))] == ["6", "8"]
    with pytest.raises(ValueError, match="set `split` of the source to one of: train, test"):
        read(source)
    with pytest.raises(ValueError, match="holds one dataset without splits; leave out split=test"):
        read(change(source, path=str(tmp_path / "saved" / "test"), split="test"))


def test_a_dataset_that_was_filtered_or_shuffled_before_it_was_saved_keeps_its_rows(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS).select([4, 1])
    dataset.save_to_disk(tmp_path / "saved")
    source = SourceConfig(kind="huggingface", path=str(tmp_path / "saved"))
    assert [p.answer for p in read(source)] == ["8", "2"]


def test_what_json_cannot_hold_becomes_text(tmp_path: Path) -> None:
    row = {"prompt": "1", "answer": 1, "day": datetime.date(2026, 1, 31), "picture": {"bytes": b"abc", "path": None}}
    [problem] = read(write(tmp_path, "parquet", [row]))
    assert problem.metadata["day"] == "2026-01-31"
    assert json.loads(json.dumps(problem.metadata))["picture"] == {"bytes": "(3 bytes)", "path": None}


def test_broken_and_empty_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(ValueError, match=r"broken\.parquet: not a parquet file: "):
        read(SourceConfig(kind="parquet", path=str(broken)))
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{tmp_path}: datasets cannot load this folder"):
        read(SourceConfig(kind="huggingface", path=str(tmp_path)))
    empty = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=r"empty\.parquet: holds no problems"):
        read(SourceConfig(kind="parquet", path=str(tmp_path / "empty.parquet")))


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_before_training_the_columns_of_tables_are_looked_at(tmp_path: Path, kind: str) -> None:
    source = change(write(tmp_path, kind, [VERL]), answer_key="reward_model.ground_truth")
    data = DataConfig(chat_template=True)
    check_problems(source, data, needs_answer=True, needs_pass_rate=False)
    with pytest.raises(ValueError, match=rf"rows.{kind}: no column `pass_rate`; there are `prompt`, `reward_model`"):
        check_problems(source, data, needs_answer=True, needs_pass_rate=True)
    with pytest.raises(ValueError, match="no column `answer`"):
        check_problems(change(source, answer_key="answer"), data, needs_answer=True, needs_pass_rate=False)
    check_problems(change(source, answer_key="answer"), data, needs_answer=False, needs_pass_rate=False)
    with pytest.raises(ValueError, match="no column `question`"):
        check_problems(source, DataConfig(prompt_template="{question}"), needs_answer=False, needs_pass_rate=False)


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_before_training_nested_columns_are_looked_at(tmp_path: Path, kind: str) -> None:
    source = change(write(tmp_path, kind, [VERL]), answer_key="reward_model.grond_truth")
    with pytest.raises(ValueError, match=rf"rows.{kind}: no column `reward_model.grond_truth`; there are `style`, `gr"):
        check_problems(source, DataConfig(chat_template=True), needs_answer=True, needs_pass_rate=False)
    data = DataConfig(prompt_template="{extra_info[qestion]}")
    message = rf"rows.{kind}: no column `extra_info.qestion`, which data.prompt_template names; there are `question`"
    with pytest.raises(ValueError, match=message):
        check_problems(source, data, needs_answer=False, needs_pass_rate=False)
    for template in ("{extra_info[question]}", "{prompt[0][content]}"):
        data = DataConfig(prompt_template=template)
        check_problems(source, data, needs_answer=False, needs_pass_rate=False)


def test_a_source_has_a_template_of_its_own(tmp_path: Path) -> None:
    data = {"prompt_template": "{problem}", "chat_template": False}
    own = change(write(tmp_path, "jsonl", ROWS[:1]), prompt_template="Q {prompt}")
    assert [p.text for p in read(own, **data)] == ["Q 0+0"]
    with pytest.raises(ValueError, match=r"data\.prompt_template names `problem`"):
        read(change(own, prompt_template=""), **data)
    wrong = change(own, prompt_template="{qestion}")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the source's prompt_template names `qestion`, which is not"):
        check_problems(wrong, DataConfig(), needs_answer=True, needs_pass_rate=False)


GYM = SourceConfig(kind="reasoning_gym", task="chain_sum", task_args={"max_terms": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chain_som"}, "reasoning_gym has no task 'chain_som'; did you mean 'chain_sum'"),
        ({"task_args": {"max_trems": 3}}, "reasoning_gym task chain_sum: task_args="),
        (
            {"prompt_template": "{problem}"},
            r"chain_sum\[0\]: the source's prompt_template names `problem`, which is not",
        ),
    ],
)
def test_before_training_a_generated_source_is_tried(changes: dict[str, Any], message: str) -> None:
    check_problems(GYM, DataConfig(), needs_answer=True, needs_pass_rate=False)
    with pytest.raises(ValueError, match=message):
        check_problems(change(GYM, **changes), DataConfig(), needs_answer=True, needs_pass_rate=False)


def test_every_kind_of_source_has_a_reader() -> None:
    assert set(_READERS) == set(CHOICES["data.train.kind"]) == set(CHOICES["data.evals.NAME.kind"])
