"""The section `reward`."""

from __future__ import annotations

from dataclasses import dataclass

START_LIMIT_S = 120.0
"""Of the processes that verify, which import sympy or a user's function, maybe on a busy machine."""


@dataclass(frozen=True)
class RewardConfig:
    """How a response is scored."""

    kind: str = "math_answer"
    """math_answer (math-verify), reasoning_gym (the task's own verifier), model, remote or function."""
    correct: float = 1.0
    """Reward of a right answer."""
    wrong: float = 0.0
    """Reward of a wrong answer."""
    time_limit_s: float = 5.0
    """Processor time for verifying one answer; past it, or past 4 times as long by the clock, it counts as wrong."""
    batch_time_limit_s: float = 300.0
    """Limit for verifying the answers of one call together; those still open count as wrong, and are reported."""
    memory_limit_mb: int = 4096
    """Memory that a process may take to verify answers; an answer that needs more counts as wrong."""
    workers: int = 4
    """Processes of each replica that verify answers."""
    function: str = ""
    """Of kind function: `package.module:name` or `file.py:name`, called with the rollouts; one number for each back."""
    url: str = ""
    """Of kind remote: URL of an HTTP service that is posted the responses (docs/rewards.md)."""
    model_path: str = ""
    """Of kind model: directory of a Bradley-Terry reward model, which SGLang classify servers are started with."""
    model_urls: tuple[str, ...] = ()
    """Of kind model: running SGLang classify servers, instead of starting one."""
    model_server_args: tuple[str, ...] = ()
    """Of kind model: more arguments for the reward model's `sglang.launch_server`."""
    request_deadline_s: float = 300.0
    """Of kinds remote and model: the responses of one call must be scored within this time."""
    max_retries: int = 3
    """Of kinds remote and model: times that a failed request is sent again."""
    format: str = "none"
    """Also asked of a response: none, boxed, think (<think>...</think>, then the answer) or pattern."""
    format_pattern: str = ""
    """Of format pattern: a regular expression that must be found in the response (`re.search`)."""
    format_reward: float = 0.0
    """Added where a response has the format; a negative amount, where it has not; 0 only adds reward/format_mean."""
    overlong_buffer_tokens: int = 0
    """Soft overlong penalty: the last tokens before rollout.max_response_tokens cost more and more; 0: off."""
    overlong_penalty: float = 1.0
    """What a response of rollout.max_response_tokens loses by the soft overlong penalty."""
    normalization: str = "none"
    """none, group (by the prompt's mean and deviation) or running (by those of all rewards so far)."""
