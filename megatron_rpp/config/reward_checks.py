"""Whether the rewards that are asked for can be computed. Imports no torch, and nothing of the user's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.config.schema import Config
from megatron_rpp.config.sources import reward_kinds
from megatron_rpp.config.templates import check_control_characters
from megatron_rpp.config.urls import is_url

_FUNCTION = re.compile(r"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|.+\.py):[A-Za-z_]\w*")
_SCORING = ("ForSequenceClassification", "RewardModel", "ForSequenceClassificationWithNormal_Weights")


def check_rewards(config: Config) -> None:
    """The limits, the format, and what each kind that some source has needs: a function, a service, a model.

    Files are looked for; nothing is imported, and no service is asked.

    Raises:
        ConfigError: the first key that must change, and to what.
    """
    kinds, reward = reward_kinds(config), config.reward
    if reward.format == "pattern":
        _check_pattern(reward.format_pattern)
    if reward.batch_time_limit_s < reward.time_limit_s:
        raise ConfigError(
            f"reward.batch_time_limit_s={reward.batch_time_limit_s} must be at least "
            f"reward.time_limit_s={reward.time_limit_s}, the limit of one answer"
        )
    if "function" in kinds:
        _check_function(reward.function)
    if "remote" in kinds:
        _check_service(reward.url)
    if "model" in kinds:
        _check_urls(reward)
        _check_model(reward.model_path)


def spawns_reward_model(config: Config) -> bool:
    """Whether rank 0 starts a server for the reward model."""
    return "model" in reward_kinds(config) and not config.reward.model_urls


def _check_pattern(pattern: str) -> None:
    if not pattern:
        raise ConfigError("reward.format_pattern is not set; reward.format=pattern needs a regular expression")
    check_control_characters("reward.format_pattern", pattern)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"reward.format_pattern={pattern!r} must be a regular expression: {error}") from error


def _check_function(path: str) -> None:
    if not path:
        raise ConfigError("reward.function is not set; pass --reward.function=FILE.py:NAME or PACKAGE.MODULE:NAME")
    if not _FUNCTION.fullmatch(path):
        raise ConfigError(f"reward.function={path} must be FILE.py:NAME or PACKAGE.MODULE:NAME")
    file = path.rpartition(":")[0]
    if file.endswith(".py") and not Path(file).is_file():
        raise ConfigError(f"reward.function={path}: there is no file {file}")


def _check_service(url: str) -> None:
    if not is_url(url):
        found = f"={url} must be" if url else " is not set; pass"
        raise ConfigError(f"reward.url{found} the URL of your service, such as http://host:8000/score")


def _check_urls(reward: RewardConfig) -> None:
    for url in reward.model_urls:
        if not is_url(url):
            raise ConfigError(f"reward.model_urls={url} must be a URL such as http://host:30000")
    if len({url.rstrip("/") for url in reward.model_urls}) < len(reward.model_urls):
        raise ConfigError("reward.model_urls names a server twice; name each once")


def _check_model(path: str) -> None:
    """The directory is there and its model gives one score; with model_urls its tokenizer is needed all the same."""
    if not path:
        raise ConfigError(
            "reward.model_path is not set; pass --reward.model_path=DIRECTORY of the reward model, whose tokenizer is "
            "needed with reward.model_urls, too"
        )
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(f"reward.model_path={path} must be a Hugging Face directory; it has no config.json")
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        name = str((config.get("architectures") or [""])[0])
        labels = int(config.get("num_labels") or len(config.get("id2label") or {}) or 2)  # 2: transformers' default
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"reward.model_path={path}: config.json cannot be read: {error}") from error
    if not name.endswith(_SCORING):
        raise ConfigError(
            f"reward.model_path={path} must be a model that scores, such as LlamaForSequenceClassification; its "
            f"config.json says architectures={name or 'nothing'}"
        )
    if name.endswith("ForSequenceClassification") and labels != 1:
        raise ConfigError(f"reward.model_path={path} must be a model with one label; it has {labels}")
