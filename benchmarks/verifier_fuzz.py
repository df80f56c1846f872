"""Adversarial answers through the math reward: what they cost, and whether any wrong one is paid for.

    python -m benchmarks.verifier_fuzz --answers 1000000 --seed 0

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.math.math_answer import MathAnswerReward

MEGABYTE = 1 << 20
GOLDS = (
    "8191", r"\frac{8191}{127}", r"8191\sqrt{31}", r"(8191, 127]", r"\{8191, 127\}", "x^{31}+8191", r"8191\text{ cm}",
)  # fmt: skip
_ATOMS = (
    *"{}()[]^_+-*/=<>!,;:.%$&'\"|~#@\\01239xyei", r"\frac", r"\sqrt", r"\left(", r"\right)", r"\pi", r"\infty", r"\cup",
    r"\text{", r"\boxed{", r"\begin{pmatrix}", r"\end{pmatrix}", r"\pm", r"\cdot", r"\times", "\\\\", " ", "\n", "\t",
    "\x00", "\u200b", "\u202e", "\ufeff", "\udcff", "\u00b2", "\u00bd", "\u0661", "\uff11", "\u2212", "\U0001d7d8",
    "\u221a", "sin", "log", "or", "and", "__import__('os')", "lambda:0", "mod", "inf", "nan",
)  # fmt: skip
_UNITS = (
    "9", "1,", "-", "$", "{", "}", r"\boxed{", "answer is ", "<answer>", "####", "a ", " ", "\\", "\u0661", "(a|", "=",
    "\n", "1 ", ".1", "1/", "<think>",
)  # fmt: skip


def fuzzed(rng: random.Random) -> str:
    return rf"\boxed{{{''.join(rng.choices(_ATOMS, k=rng.randint(1, 40)))}}}"


def unmarked(rng: random.Random) -> str:
    return "".join(rng.choices(_ATOMS, k=rng.randint(1, 200)))


def unicode_digits(rng: random.Random) -> str:
    zero = rng.choice((0x660, 0x6F0, 0x966, 0xFF10, 0x1D7CE, 0x1D7D8))
    return rf"\boxed{{{''.join(chr(zero + int(d)) for d in str(rng.randint(1, 8190)))}}}"


def tower(rng: random.Random) -> str:
    text = "9"
    for _ in range(rng.randint(2, 5)):
        text = rf"{rng.randint(7, 99)}^{{{text}}}"
    return rf"\boxed{{{text}}}"


def factorial(rng: random.Random) -> str:
    return rf"\boxed{{{rng.randint(10**5, 10**12)}{'!' * rng.randint(1, 4)}}}"


def hard(rng: random.Random) -> str:
    n = rng.randint(10**6, 10**12)
    return rng.choice(
        (
            rf"\boxed{{\sum_{{n=1}}^{{{n}}} \sin(n)}}",
            rf"\boxed{{\prod_{{k=1}}^{{{n}}} (k^2+1)}}",
            rf"\boxed{{\int_0^{{{n}}} e^{{\sin(x^x)}} dx}}",
            rf"\boxed{{\binom{{{n}}}{{{n // 2}}}}}",
            rf"\boxed{{x^{{{n}}}-1 = (x+1)^{{{n}}}}}",
            rf"\boxed{{\sqrt[{n}]{{{n}!}}}}",
        )
    )


def nested(rng: random.Random) -> str:
    depth = rng.choice((100, 400, 10_000, 100_000))
    opening, closing = rng.choice((("{", "}"), ("(", ")"), (r"\sqrt{", "}"), (r"\frac{1}{", "}"), (r"\boxed{", "}")))
    return rf"\boxed{{{opening * depth}1{closing * rng.choice((0, depth // 2, depth))}}}"


def long_number(rng: random.Random) -> str:
    digits = "1" * rng.choice((50, 200, 900, 5_000))
    return rng.choice(
        (rf"\boxed{{{digits}}}", f"the answer is {digits}", rf"\boxed{{0.{digits}}}", digits + "/" + digits + "1")
    )


def megabyte(rng: random.Random) -> str:
    unit = rng.choice(_UNITS)
    return unit * (rng.choice((MEGABYTE // 64, MEGABYTE)) // len(unit)) + rng.choice(("", "1", "}", "</answer>"))


def trick(rng: random.Random) -> str:
    wrong = rng.randint(128, 8190)
    return rng.choice(
        (
            rf"\text{{\boxed{{}}}} \boxed{{{wrong}}}",
            rf"<answer>8191 \boxed{{{wrong}}}",
            rf"8191 </answer><answer>{wrong}</answer>",
            rf"<answer>{wrong}</answer></answer>",
            rf"\boxed{{8191 \text{{ or }} {wrong}}}",
            rf"\boxed{{\text{{all of }} 8191, {wrong}}}",
            rf"\boxed{{8191 + {wrong}}}",
            rf"\boxed{{8191 = {wrong}}}",
            rf"\boxed{{x = 8191, x = {wrong}}}",
            r"\boxed{\pm 8191}",
            r"\boxed{gold}",
            rf"\boxed{{__import__('os').system('exit {wrong}')}}",
            r"\boxed{exec('raise SystemExit')}",
            rf"\boxed{{().__class__.__bases__[0].__subclasses__()[{wrong}]}}",
            rf"\boxed{{{'(a+)+' * 5}{'a' * 30}b}}",
            rf"\boxed{{8191.{wrong}}} % 8191",
            f"#### {wrong}\n8191 is not it",
            f"Answer: {wrong}. Not 8191.",
            "$" * rng.randint(1, 2000) + str(wrong) + "$" * rng.randint(1, 2000),
        )
    )


KINDS: dict[Callable[[random.Random], str], float] = {
    fuzzed: 30, unmarked: 20, unicode_digits: 10, trick: 25, long_number: 11, nested: 3, megabyte: 0.8,
    tower: 0.1, factorial: 0.05, hard: 0.05,
}  # fmt: skip


def adversarial(count: int, seed: int) -> Iterator[Rollout]:
    """Responses of which none is right: no atom and no number of them makes up the value of a gold answer."""
    rng = random.Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    for _ in range(count):
        text = rng.choices(kinds, weights)[0](rng)
        prompt = Prompt(id=0, text="", token_ids=(1,), answer=rng.choice(GOLDS))
        reason = rng.choice(("stop", "stop", "stop", "length"))
        yield Rollout(prompt, 0, (1,), (0.0,), text, reason, (VersionSpan(0, 0, 1),))


def run(answers: int, seed: int, batch: int, config: RewardConfig) -> dict[str, float]:
    """What they cost; false_right counts those that were paid for, crashes the calls that raised.

    Processor time is of this process, outside of the workers, and of the workers with their parent.
    """
    reward = MathAnswerReward(config)
    outside_s, workers_s = time.process_time(), _ended_children_s()
    slowest = seconds = false_right = crashes = done = 0.0
    responses = adversarial(answers, seed)
    while rollouts := list(islice(responses, batch)):
        start = time.perf_counter()
        try:
            scores = reward(rollouts)
        except Exception as error:
            print(f"raised {type(error).__name__}: {error}"[:500], flush=True)
            crashes += 1
            scores = []
        done += len(rollouts)
        took = time.perf_counter() - start
        print(f"{done:.0f} answers, {took:.1f} s", file=sys.stderr)
        seconds, slowest = seconds + took, max(slowest, took)
        for rollout, score in zip(rollouts, scores, strict=False):
            if score != config.wrong:
                false_right += 1
                print(f"paid for {rollout.text[:200]!r} where {rollout.prompt.answer} is right", flush=True)
    failures = reward.metrics().sums
    outside_s = time.process_time() - outside_s
    reward.close()  # only then is what they took known
    return {
        "answers": answers,
        "seconds": seconds,
        "answers_per_second": answers / seconds,
        "slowest_call_s": slowest,
        "processor_s": outside_s,
        "workers_processor_s": _ended_children_s() - workers_s,
        "timeouts": failures["reward/timeouts"],
        "broken": failures["reward/broken"],
        "false_right": false_right,
        "crashes": crashes,
    }


def _ended_children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1024, help="answers in one call, as of one step")
    parser.add_argument("--time-limit-s", type=float, default=RewardConfig.time_limit_s)
    parser.add_argument("--batch-time-limit-s", type=float, default=RewardConfig.batch_time_limit_s)
    parser.add_argument("--workers", type=int, default=RewardConfig.workers)
    args = parser.parse_args()
    config = RewardConfig(
        time_limit_s=args.time_limit_s, batch_time_limit_s=args.batch_time_limit_s, workers=args.workers
    )
    print(json.dumps(run(args.answers, args.seed, args.batch, config)))


if __name__ == "__main__":
    main()
