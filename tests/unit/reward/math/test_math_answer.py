"""The math reward: right answers pay, wrong and hostile ones do not, and none takes long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.math.extract import final_answer, plain_number
from megatron_rpp.reward.math.math_answer import MathAnswerReward, quick_verdict


def rollout(text: str, answer: str, finish_reason: str = "stop") -> Rollout:
    prompt = Prompt(id=0, text="", token_ids=(1,), answer=answer)
    return Rollout(prompt, 0, (1,), (0.0,), text, finish_reason, (VersionSpan(0, 0, 1),))


@pytest.fixture(scope="module")
def reward() -> Iterator[MathAnswerReward]:
    reward = MathAnswerReward(RewardConfig(correct=1.0, wrong=-1.0, time_limit_s=2.0))
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def impatient() -> Iterator[MathAnswerReward]:
    reward = MathAnswerReward(RewardConfig(time_limit_s=0.3))
    reward([rollout(r"8\pi", r"7\pi")])  # starts its processes
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{f(x) = {a}} and \boxed{unclosed", "f(x) = {a}"),
        ("2+2 is 4.\n#### 1,234\n", "1,234"),
        ("The answer is 12. That was easy: 3 steps.", "12"),
        ("Answer: **-7**", "-7"),
        ("the answer is therefore 12 since 3 of 4 hold", "12"),
        ("<answer> 3/4 </answer>", "3/4"),
        ("first 5, then 7 and so on", "7"),
        ("take 9 from it and you get -3", "-3"),
        ("subtract and get 5-3", "3"),
        (" 191 ", "191"),
        (r"$\sqrt{2}$", r"\sqrt{2}"),
        ("no number here at all", "no number here at all"),
        ("no number here at all and far too long to be an answer of any kind", ""),
        ("sin x + cos x", "sin x + cos x"),
        ("", ""),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        (r"\boxed{\frac{2}{4}}", r"\frac12", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\boxed{(1,2)}", "(1, 2)", True),
        (r"\boxed{(2,1)}", "(1, 2)", False),
        (r"\boxed{2^{10}}", "1024", True),
        (r"\boxed{5\text{ cm}}", "5", True),
        ("5 apples", "5", True),
        ("0.333333", "1/3", True),
        (r"1 \times 10^5", "100000", True),
        ("#### 1,234", "1234", True),
        ("007", "7", True),
        (r"\boxed{12 + 5 = 17}", "17", True),
        ("x = .5", "0.5", True),
        ("Paris is nice", "Paris is nice", True),
        ("-7", "7", False),
        ("71", "7", False),
        ("", "7", False),
    ],
)
def test_equal_answers_pay_and_others_do_not(reward: MathAnswerReward, text: str, gold: str, right: bool) -> None:
    assert reward([rollout(text, gold)]) == [1.0 if right else -1.0]


@pytest.mark.parametrize("text", ["12 + 5", r"\boxed{12+5}", r"\boxed{20 - 3}", r"\boxed{17 \times 1}"])
def test_repeating_the_question_does_not_pay(reward: MathAnswerReward, text: str) -> None:
    assert reward([rollout(text, "17")]) == [-1.0]


def test_a_truncated_response_scores_only_by_a_marked_answer(reward: MathAnswerReward) -> None:
    texts = ["first 3 and then 7", r"\boxed{7} and then"]
    assert reward([rollout(text, "7", "length") for text in texts]) == [-1.0, 1.0]


@pytest.mark.parametrize(
    "text",
    [
        r"9^{9^{9^{9}}}",
        r"\boxed{10^{10^{10}}!}",
        r"\boxed{\sum_{n=1}^{10^{12}} \sin(n)}",
        r"\boxed{" + "(" * 900 + "}",
        r"\boxed{" * 5000,
        "{" * 50_000,
        "9" * 100_000,
        "1," * 50_000,
        "-" * 50_000 + "1",
        "answer is " * 10_000,
        "a " * 50_000,
        "\x00\udcff\u202e",
        r"\frac" * 15,
        "1/0",
    ],
)
def test_hostile_text_is_wrong_and_never_raises(impatient: MathAnswerReward, text: str) -> None:
    start = time.perf_counter()
    assert impatient([rollout(text, r"7\pi")]) == [0.0]
    assert time.perf_counter() - start < 6.0  # twice 0.3 s, on a busy machine


def test_an_answer_that_hangs_does_not_spoil_its_neighbours(reward: MathAnswerReward) -> None:
    texts = [r"\pi\cdot 7", r"9^{9^{9^{9}}}", r"7\cdot\pi", r"8\pi"]
    assert reward([rollout(text, r"7\pi") for text in texts]) == [1.0, -1.0, 1.0, -1.0]


def test_it_works_outside_the_main_thread(reward: MathAnswerReward) -> None:
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.extend(reward([rollout(r"\frac{3}{6}", "0.5")])))
    thread.start()
    thread.join()
    assert results == [1.0]


def test_answers_keep_their_order_when_several_workers_share_them() -> None:
    reward = MathAnswerReward(RewardConfig())
    golds = [rf"{i}\sqrt{{2}}" for i in range(80)]
    texts = [rf"\sqrt{{2}}\cdot {i if i % 3 else i + 1}" for i in range(80)]
    pairs = zip(texts, golds, strict=True)
    assert reward([rollout(t, g) for t, g in pairs]) == [1.0 if i % 3 else 0.0 for i in range(80)]
    reward.close()


def test_short_answers_to_numbers_start_no_process() -> None:
    reward = MathAnswerReward(RewardConfig())
    rollouts = [rollout(text, "100") for i in range(128) for text in (str(i), f"{i}+-", f" ={i}", "no")]
    assert sum(reward(rollouts)) == 2.0
    assert not reward._pool.is_running


def test_numbers_are_compared_exactly() -> None:
    big = "1" + "0" * 30
    assert quick_verdict(big + "1", big + "0") is False
    assert quick_verdict("0.10", "0.1") is True
    assert quick_verdict("2/4", "1/2") is True
    assert plain_number("1e999999999") is None
    assert plain_number("1,23") is None
    assert quick_verdict("5 5", "55") is None
    assert quick_verdict("2x + 3y = 6", "6") is None
