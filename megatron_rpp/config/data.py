"""The sections `data` and `eval`: which problems are trained on and which are held out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SourceConfig:
    """One source of prompts."""

    kind: str = "jsonl"
    """jsonl (one object a line), parquet, huggingface (`datasets` saved to disk) or reasoning_gym."""
    path: str = ""
    """File (jsonl); file, folder or pattern such as DIR/train-*.parquet; folder of `Dataset.save_to_disk`."""
    split: str = ""
    """Of a huggingface source with several splits: the one to read."""
    prompt_template: str = ""
    """Of this source's prompts; empty: data.prompt_template."""
    answer_key: str = "answer"
    """Key of the right answer; dotted for one in a nested table, such as reward_model.ground_truth."""
    weight: float = 0.0
    """Of data.sources: this source's share of the prompts, relative to the others'. All 0: by their sizes."""
    reward: str = ""
    """Kind of reward of this source's prompts; empty: reward.kind."""
    verdicts: bool = False
    """Of data.evals with rewards of kind function or remote: 1 is right and less, down to 0, wrong; gives pass@k."""
    pass_rate_key: str = "pass_rate"
    """Key of a problem's known pass rate, from 0 to 1, for the filter and the curriculum."""
    min_pass_rate: float = 0.0
    """Problems with a lower known pass rate are left out."""
    max_pass_rate: float = 1.0
    """Problems with a higher known pass rate are left out."""
    task: str = ""
    """Task name of a reasoning_gym source, such as chain_sum."""
    task_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the reasoning_gym task."""
    size: int = 0
    """The most problems to take, from the first on; 0: all of a file, and 25,000 of a reasoning_gym task."""
    seed: int = 0
    """Seed of a reasoning_gym source; give training and held-out ones different ones."""

    @property
    def is_set(self) -> bool:
        """Whether anything of it has been set, complete or not."""
        return bool(self.path or self.task) or self.kind != "jsonl"

    @property
    def is_filtered(self) -> bool:
        """Whether problems are left out by their known pass rate."""
        return self.min_pass_rate > 0 or self.max_pass_rate < 1


@dataclass(frozen=True)
class DataConfig:
    """Prompts for training and evaluation."""

    train: SourceConfig = field(default_factory=SourceConfig)
    """Training prompts, of one source; instead of data.sources."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Training prompts of several sources, mixed by weight: data.sources.NAME.path and so on; instead of data.train."""
    curriculum: str = "none"
    """Order of the prompts in an epoch: none (shuffled) or easy_first (by falling pass rate)."""
    evals: dict[str, SourceConfig] = field(default_factory=dict)
    """Held-out sets by name: data.evals.NAME.path and so on; metrics are eval/NAME/..."""
    prompt_template: str = "{prompt}"
    """Text of a prompt, or of a conversation's last turn; names in braces are keys of the record (docs/data.md)."""
    chat_template: bool = False
    """Wrap the prompt as a user turn, or the conversation as it is, in the tokenizer's chat template."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given beside the conversation, such as { enable_thinking = false } (docs/data.md)."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out accuracy during training."""

    interval: int = 10
    """Steps between evaluations; also before the first (written with step 0) and after the last. 0: never."""
    num_prompts: int = 256
    """Prompts of one evaluation, of each set."""
    samples: int = 1
    """Responses sampled to each prompt, for pass@k and maj@k."""
    pass_at: tuple[int, ...] = ()
    """The k of pass@k and maj@k, at most eval.samples; empty: eval.samples alone, where it is above 1."""
