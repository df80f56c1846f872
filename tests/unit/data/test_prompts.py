"""Prompts: what is read, what is refused, and the order in which they are served."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.data.jsonl import check_jsonl
from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.data.prompts import load_demonstrations, load_prompts
from megatron_rpp.experience.types import Prompt


class Characters:
    """One token a character, its code point."""

    eos_token_ids = (1, 2)
    pad_token_id = 0
    vocab_size = 200

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_prompts(self, texts: Sequence[str], *, chat: bool) -> list[list[int]]:
        return self.encode_many([self.render_chat(text) for text in texts] if chat else texts)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)

    def render_chat(self, text: str) -> str:
        return f"[{text}]"

    def apply_chat_template(self, text: str) -> list[int]:
        return self.encode(self.render_chat(text))


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return str(path)


def load(source: SourceConfig, template: str = "{prompt}", limit: int = 100, chat: bool = False) -> list[Prompt]:
    data = DataConfig(prompt_template=template, chat_template=chat)
    return load_prompts(source, data, Characters(), max_prompt_tokens=limit)


def test_a_jsonl_object_becomes_a_prompt(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "1+1", "answer": 2, "level": "easy"},
        "",
        {"prompt": "x", "answer": "y"},
    )
    first, second = load(SourceConfig(path=path), "Q {prompt}")
    assert (first.id, first.text, first.answer) == (0, "Q 1+1", "2")
    assert first.token_ids == tuple(map(ord, "Q 1+1"))
    assert first.metadata["level"] == "easy"
    assert (second.id, second.answer) == (1, "y")


def test_size_limits_how_many_lines_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": str(i), "answer": "0"} for i in range(5)))
    assert [p.text for p in load(SourceConfig(path=path, size=3))] == ["0", "1", "2"]
    assert [p.text for p in load(SourceConfig(path=path, size=0))] == ["0", "1", "2", "3", "4"]


def test_chat_template_wraps_the_formatted_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "1", "answer": "2"})
    (prompt,) = load(SourceConfig(path=path), "{prompt}=", chat=True)
    assert prompt.token_ids == tuple(map(ord, "[1=]"))


GOOD = {"prompt": "1", "answer": "2"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", r"a\.jsonl:2: not JSON"),
        ("[1, 2]", r"a\.jsonl:2: an array, not an object"),
        ({"prompt": "1"}, r"a\.jsonl:2: no `answer`; the object has `prompt`"),
        ({"answer": "1"}, r"a\.jsonl:2: data\.prompt_template names `prompt`.*available: `answer`"),
        ({"prompt": "1", "answer": None}, r"a\.jsonl:2: `answer` must be text or a number, not null"),
        ({"prompt": "1", "answer": True}, r"a\.jsonl:2: `answer` must be text .* not true or false"),
        ("[" * 100_000, r"a\.jsonl:2: cannot be read"),
        ({"prompt": "", "answer": "1"}, r"a\.jsonl:2: the prompt is empty"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(SourceConfig(path=write(tmp_path / "a.jsonl", GOOD, bad)))


def test_blank_missing_and_misencoded_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the file holds no objects"):
        load(SourceConfig(path=write(tmp_path / "a.jsonl", "", "  ")))
    with pytest.raises(ValueError, match="no such file"):
        load(SourceConfig(path=str(tmp_path / "gone.jsonl")))
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl:1: not UTF-8"):
        load(SourceConfig(path=str(tmp_path / "b.jsonl")))


def test_a_prompt_that_is_too_long_names_line_count_limit_and_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, {"prompt": "x" * 11, "answer": "1"})
    message = r"a\.jsonl:2: .* 11 tokens, the limit is 10; .*rollout\.context_length.*rollout\.max_response_tokens"
    with pytest.raises(ValueError, match=message):
        load(SourceConfig(path=path), limit=10)


def test_a_broken_template_is_reported_as_such(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.prompt_template='\{prompt' must be a valid template"):
        load(SourceConfig(path=write(tmp_path / "a.jsonl", GOOD)), "{prompt")


GYM = SourceConfig(kind="reasoning_gym", task="chain_sum", size=20, task_args={"max_terms": 2, "max_digits": 2})


def test_reasoning_gym_templates_may_name_metadata_and_question() -> None:
    prompt = load(GYM, "{expression}=")[3]
    entry = prompt.metadata
    assert prompt.text == entry["metadata"]["expression"] + "="
    assert str(eval(prompt.text[:-1])) == prompt.answer == entry["answer"]
    assert load(GYM, "{question}")[3].text == load(GYM, "{prompt}")[3].text == entry["question"]


def test_neighbouring_reasoning_gym_seeds_share_no_run_of_problems() -> None:
    def texts(seed: int) -> list[str]:
        arguments = {"min_digits": 4, "max_terms": 3}
        source = SourceConfig(kind="reasoning_gym", task="chain_sum", size=20, seed=seed, task_args=arguments)
        return [p.text for p in load(source, "{expression}")]

    assert texts(0) == texts(0)
    assert not set(texts(0)) & set(texts(1))


def test_an_unknown_task_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="no task 'chain_sums'; did you mean 'chain_sum'"):
        load(SourceConfig(kind="reasoning_gym", task="chain_sums"))


@pytest.mark.parametrize("arguments", [{"max_term": 2}, {"min_terms": 0}, {"seed": 3}])
def test_bad_task_arguments_are_value_errors(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="chain_sum"):
        load(SourceConfig(kind="reasoning_gym", task="chain_sum", task_args=arguments))


def test_an_unknown_template_key_lists_the_entry_keys() -> None:
    with pytest.raises(ValueError, match=r"chain_sum\[0\]: .* `text`.*available: .*`expression`.*`question`"):
        load(GYM, "{text}")


def test_loading_25_000_problems_is_fast() -> None:
    start = time.perf_counter()
    source = SourceConfig(kind="reasoning_gym", task="chain_sum")  # of size 0: this many
    assert len(load(source, "{expression}=")) == 25_000
    assert time.perf_counter() - start < 10.0


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=i, text=str(i), token_ids=(i,), answer="") for i in range(count)]


def ids(source: PromptSource, batches: int) -> list[int]:
    return [p.id for _ in range(batches) for p in source.next_batch()]


def test_an_epoch_serves_each_prompt_once_and_the_next_in_another_order() -> None:
    served = ids(PromptSource(prompts(10), 4, seed=3), 5)  # two epochs; the third batch spans both
    assert sorted(served[:10]) == sorted(served[10:]) == list(range(10))
    assert served[:10] != served[10:] and served[:10] != list(range(10))


def test_the_order_depends_on_the_seed_alone() -> None:
    assert ids(PromptSource(prompts(50), 5, seed=1), 10) == ids(PromptSource(prompts(50), 5, seed=1), 10)
    assert ids(PromptSource(prompts(50), 5, seed=1), 10) != ids(PromptSource(prompts(50), 5, seed=2), 10)


@pytest.mark.parametrize("before", [0, 1, 2, 3, 7])
def test_a_resumed_run_gets_the_prompts_of_an_uninterrupted_one(before: int) -> None:
    whole = ids(PromptSource(prompts(10), 4, seed=3), before + 4)
    first = PromptSource(prompts(10), 4, seed=3)
    ids(first, before)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = PromptSource(prompts(10), 4, seed=3)
    resumed.load_state_dict(state)
    assert ids(resumed, 4) == whole[before * 4 :]


def test_resuming_with_other_data_or_seed_is_refused() -> None:
    state = PromptSource(prompts(10), 4, seed=3).state_dict()
    with pytest.raises(ValueError, match=r"run\.seed is 4"):
        PromptSource(prompts(10), 4, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="number of prompts"):
        PromptSource(prompts(11), 4, seed=3).load_state_dict(state)


@pytest.mark.parametrize("num_prompts", [0, 11])
def test_a_batch_larger_than_the_data_is_refused(num_prompts: int) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.num_prompts={num_prompts} .* 10 prompts"):
        PromptSource(prompts(10), num_prompts, seed=0)


def test_demonstrations_have_the_prompts_of_training_and_one_end_token(tmp_path: Path) -> None:
    data = DataConfig(prompt_template="{expression}=", chat_template=True)
    path = write(
        tmp_path / "d.jsonl",
        {"expression": "1 + 1", "response": "2", "answer": "3"},
        {"expression": "4", "answer": 5},
    )
    (first, second) = load_demonstrations(path, Characters(), data)
    assert first == ([ord(c) for c in "[1 + 1=]"], [ord("2"), 1])
    assert second[1] == [ord("5"), 1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "1"}, r"d\.jsonl:2: no `response` or `answer`"),
        ({"response": "1"}, r"d\.jsonl:2: .*`prompt`"),
        ({"prompt": "1", "response": "x" * 20}, r"d\.jsonl:2: .* 22 tokens.*rollout\.context_length=10"),
    ],
)
def test_a_bad_demonstration_is_named_by_its_line(tmp_path: Path, bad: object, message: str) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "1", "response": "1"}, bad)
    with pytest.raises(ValueError, match=message):
        load_demonstrations(path, Characters(), DataConfig(), max_tokens=10)


def test_the_quick_check_counts_objects_and_names_the_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, GOOD)
    assert check_jsonl(path, ["prompt", ("response", "answer")]) == 2
    assert check_jsonl(path, ["prompt"], limit=1) == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no `level`"):
        check_jsonl(path, ["prompt", "level"])


def test_the_quick_check_imports_nothing_heavy() -> None:
    code = (
        "import sys, megatron_rpp.data.tokenizer, megatron_rpp.data.reasoning_gym, megatron_rpp.data.problems;"
        "import megatron_rpp.data.tables;"
        "heavy = {'torch', 'transformers', 'reasoning_gym', 'datasets', 'pyarrow'};"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_every_prompt_is_served_equally_often_over_epochs() -> None:
    assert set(Counter(ids(PromptSource(prompts(6), 4, seed=0), 9)).values()) == {6}
