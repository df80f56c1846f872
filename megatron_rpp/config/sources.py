"""Which sources of prompts a run reads, and whether they can be read. Imports no torch."""

from __future__ import annotations

from glob import glob
from pathlib import Path
from typing import Any

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.ranges import CHOICES
from megatron_rpp.config.schema import Config
from megatron_rpp.config.templates import check_template

HELD_OUT = "data.evals."  # what the keys of held-out sets begin with
_VERIFIED = ("math_answer", "reasoning_gym")
_OWN_CODE = ("function", "remote")


def training_sources(data: DataConfig) -> dict[str, SourceConfig]:
    """By Prompt.source: data.sources by their names, or "" for data.train."""
    return dict(data.sources) or {"": data.train}


def held_out_sources(config: Config) -> dict[str, SourceConfig]:
    """What is evaluated, by Prompt.source: data.evals by their names."""
    return dict(config.data.evals) if config.eval.interval else {}


def source_keys(config: Config) -> dict[str, SourceConfig]:
    """Every source of the run by its section's key: data.train, data.sources.math, data.evals.aime."""
    training = {
        f"data.sources.{name}" if name else "data.train": s for name, s in training_sources(config.data).items()
    }
    return training | {f"data.evals.{name}": source for name, source in held_out_sources(config).items()}


def named_sources(data: DataConfig) -> dict[str, SourceConfig]:
    """Every source that has a section, used or not, by the section's key: data.train, data.evals.aime."""
    named = {f"data.sources.{name}": source for name, source in data.sources.items()}
    named |= {f"data.evals.{name}": source for name, source in data.evals.items()}
    return {"data.train": data.train, **named}


def is_verified(config: Config, source: SourceConfig) -> bool:
    """Whether its responses are right or wrong by a known answer, rather than graded by a model or by user's code."""
    return (source.reward or config.reward.kind) in _VERIFIED


def gives_verdicts(config: Config, source: SourceConfig) -> bool:
    """Whether its rewards are right or wrong: by a known answer, or because its user says so of their own code."""
    return source.verdicts or is_verified(config, source)


def reward_kinds(config: Config) -> frozenset[str]:
    """The kinds of reward that any source of the run asks for."""
    sources = (*training_sources(config.data).values(), *held_out_sources(config).values())
    return frozenset(source.reward or config.reward.kind for source in sources)


def parquet_files(path: str) -> list[Path]:
    """The files of a parquet source, in the order of their names: those of a folder, or that match a pattern."""
    pattern = str(Path(path) / "*.parquet") if Path(path).is_dir() else path
    return [Path(found) for found in sorted(glob(pattern)) if Path(found).is_file()]


def check_sources(config: Config) -> None:
    """Raises ConfigError for the first source that cannot be what it is said to be."""
    data = config.data
    if data.sources and data.train.is_set:
        raise ConfigError("data.train and data.sources are both set; name the training prompts in one way")
    weights = {name: source.weight for name, source in data.sources.items()}
    unweighted = next((name for name, weight in weights.items() if weight == 0), None)
    if any(weights.values()) and unweighted is not None:
        raise ConfigError(f"data.sources.{unweighted}.weight is not set, but others are; set all of them or none")
    sources = source_keys(config)
    held_out = {key: source for key, source in sources.items() if key.startswith(HELD_OUT)}
    training = {key: source for key, source in sources.items() if key not in held_out}
    for key, source in sources.items():
        _check_source(key, source, config.reward.kind)
        is_ordered = key in training and data.curriculum == "easy_first"
        if source.kind == "reasoning_gym" and (source.is_filtered or is_ordered):
            raise ConfigError(
                f"{key}.kind=reasoning_gym has no known pass rates; leave out its min_pass_rate and max_pass_rate, "
                "and data.curriculum=easy_first"
            )
    for key, source in held_out.items():
        same = next((known for known, other in training.items() if _share_problems(other, source)), None)
        if same is not None and (source.is_filtered or training[same].is_filtered):
            raise ConfigError(
                f"{key} must differ from {same}, in its path, or by pass rates (with the same pass_rate_key) that do "
                "not meet, both ends included: it is held out"
            )
        if same is not None:
            raise ConfigError(f"{key} must differ from {same}, in its path, task or seed: it is held out")


def _share_problems(one: SourceConfig, other: SourceConfig) -> bool:
    """Whether both may hold the same problem: they read the same, and not slices of it without a common pass rate."""
    are_apart = one.pass_rate_key == other.pass_rate_key and (
        one.max_pass_rate < other.min_pass_rate or other.max_pass_rate < one.min_pass_rate
    )
    return _problems(one) == _problems(other) and not are_apart


def _problems(source: SourceConfig) -> tuple[Any, ...]:
    """What decides which problems it holds, whatever is asked about them and how."""
    path = Path(source.path).resolve() if source.path else None
    return source.kind, path, source.split, source.task, source.task_args, source.seed


def _check_source(key: str, source: SourceConfig, reward_kind: str) -> None:
    kinds = CHOICES["reward.kind"]
    if source.reward and source.reward not in kinds:
        raise ConfigError(f"{key}.reward={source.reward} must be empty or one of: {', '.join(kinds)}")
    if (source.reward or reward_kind) == "reasoning_gym" and source.kind != "reasoning_gym":
        said = f"{key}.reward" if source.reward else "reward.kind"
        raise ConfigError(f"{said}=reasoning_gym must go with {key}.kind=reasoning_gym, not {source.kind}")
    if source.weight and not key.startswith("data.sources."):
        raise ConfigError(f"{key}.weight={source.weight} has no meaning: only data.sources are mixed; set it to 0")
    if source.verdicts:
        _check_verdicts(key, source.reward or reward_kind)
    if source.min_pass_rate > source.max_pass_rate:
        raise ConfigError(
            f"{key}.min_pass_rate={source.min_pass_rate} must be at most {key}.max_pass_rate={source.max_pass_rate}"
        )
    if source.prompt_template:
        check_template(f"{key}.prompt_template", source.prompt_template)
    _check_place(key, source)


def _check_verdicts(key: str, reward_kind: str) -> None:
    if not key.startswith(HELD_OUT):
        raise ConfigError(f"{key}.verdicts=true has no meaning: only data.evals are measured by it; leave it out")
    if reward_kind in _VERIFIED:
        raise ConfigError(
            f"{key}.verdicts=true has no meaning: rewards of kind {reward_kind} are verdicts; leave it out"
        )
    if reward_kind not in _OWN_CODE:
        raise ConfigError(f"{key}.verdicts=true must go with a reward of kind function or remote, not {reward_kind}")


def _check_place(key: str, source: SourceConfig) -> None:
    """Its files are there."""
    path = Path(source.path)
    if source.kind == "reasoning_gym":
        if not source.task:
            raise ConfigError(
                f"{key}.task is not set; pass --{key}.task=NAME of a reasoning-gym task, such as chain_sum"
            )
        return
    if not source.path:
        raise ConfigError(f"{key}.path is not set; pass --{key}.path={_EXAMPLES[source.kind]}")
    if source.kind == "jsonl" and not path.is_file():
        raise ConfigError(f"{key}.path={path} must be an existing file")
    if source.kind == "jsonl" and _is_parquet(path):
        raise ConfigError(f"{key}.path={path} is a parquet file; set {key}.kind=parquet")
    if source.kind == "parquet" and not parquet_files(source.path):
        raise ConfigError(f"{key}.path={path} must be a parquet file, a folder of such files or a pattern they match")
    if source.kind == "huggingface" and not any((path / name).is_file() for name in _SAVED):
        raise ConfigError(f"{key}.path={path} must be a folder that Dataset.save_to_disk has written")


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


_EXAMPLES = {"jsonl": "FILE.jsonl", "parquet": "FILE.parquet", "huggingface": "FOLDER"}
_SAVED = ("state.json", "dataset_dict.json")
