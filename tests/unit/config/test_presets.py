"""Presets as configuration: what they are, what wins over them, and their table in docs/algorithm.md.

`python -m tests.unit.config.test_presets` prints that table.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config import Config
from megatron_rpp.config.algorithm_checks import check_algorithm
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import flatten
from megatron_rpp.config.load import dump_toml, load_config
from megatron_rpp.config.presets import GROUP_ESTIMATORS, PRESETS, algorithm_config
from megatron_rpp.config.ranges import CHOICES, check_ranges
from megatron_rpp.config.schema import AlgorithmConfig

DOCUMENT = Path(__file__).parents[3] / "docs" / "algorithm.md"
KEYS = [field.name for field in fields(AlgorithmConfig) if field.name not in ("preset", "num_samples_per_prompt")]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def presets_table() -> str:
    """Every setting of every preset as markdown; what differs from `paper` is bold."""
    settings = {name: algorithm_config(name) for name in PRESETS}
    lines = [f"| key | {' | '.join(settings)} |", "|---" * (len(settings) + 1) + "|"]
    for key in KEYS:
        cells = [_cell(getattr(config, key)) for config in settings.values()]
        shown = [cell if cell == cells[0] else f"**{cell}**" for cell in cells]
        lines.append(f"| `{key}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def load(tmp_path: Path, *texts: str, overrides: tuple[str, ...] = ()) -> Config:
    paths = []
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        paths.append(str(path))
    return load_config(paths, list(overrides))


def test_the_defaults_are_the_preset_paper() -> None:
    """Else `rpp train` without a preset would be neither the paper's nor a named algorithm."""
    assert AlgorithmConfig() == algorithm_config("paper") == algorithm_config() == load_config([], []).algorithm
    assert PRESETS["paper"] == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_configuration(preset: str) -> None:
    config = load_config([], [f"--algorithm.preset={preset}"])
    assert config.algorithm == algorithm_config(preset)
    assert config.algorithm.preset == preset
    assert config.algorithm.num_samples_per_prompt == 4
    check_ranges(flatten(config))
    check_algorithm(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_only_what_differs_from_the_paper(preset: str) -> None:
    """A key that repeats the default would hide, in the source, what the preset changes."""
    assert PRESETS[preset].keys() <= set(KEYS)
    repeated = [key for key, value in PRESETS[preset].items() if value == getattr(AlgorithmConfig(), key)]
    assert repeated == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_holds_the_types_of_the_schema(preset: str) -> None:
    """An int for a float would make `config.toml` of a preset unequal to the preset."""
    config = algorithm_config(preset)
    wrong = [key for key in KEYS if type(getattr(config, key)) is not type(getattr(AlgorithmConfig(), key))]
    assert wrong == []


def test_no_two_presets_are_the_same_algorithm() -> None:
    distinct = {tuple(sorted(asdict(replace(algorithm_config(name), preset="")).items())) for name in PRESETS}
    assert len(distinct) == len(PRESETS)


def test_estimators_with_a_group_baseline_are_those_that_need_two_samples() -> None:
    for preset in PRESETS:
        config = replace(Config(), algorithm=algorithm_config(preset, num_samples_per_prompt=1))
        if config.algorithm.estimator in GROUP_ESTIMATORS:
            with pytest.raises(ConfigError, match=r"num_samples_per_prompt=1 must be at least 2 for .*estimator="):
                check_algorithm(config)
        else:
            check_algorithm(config)
    assert set(GROUP_ESTIMATORS) | {"reinforce_pp", "remax"} == set(CHOICES["algorithm.estimator"])


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("kl_coeff", "kl_coef"),
        ("dualclip", "dual_clip"),
        ("clip_eps_hi", "clip_eps_high"),
        ("samples_per_prompt", "num_samples_per_prompt"),
        ("normalize_by_std", None),
    ],
)
def test_an_unknown_setting_error_names_the_nearest_or_all(key: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        algorithm_config("paper", **{key: 1.0})
    expected = f"did you mean {nearest}?" if nearest else "the settings are: clip_eps_high, clip_eps_low, "
    assert str(caught.value).startswith(f"unknown setting {key}; {expected}")


def test_an_unknown_preset_error_names_the_presets(tmp_path: Path) -> None:
    expected = f"algorithm.preset=openrlfh must be one of: {', '.join(PRESETS)}"
    for attempt in (
        lambda: algorithm_config("openrlfh"),
        lambda: load_config([], ["--algorithm.preset=openrlfh"]),
        lambda: load(tmp_path, '[algorithm]\npreset = "openrlfh"\n'),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("estimator", "reinforce++", "algorithm.estimator=reinforce.. must be one of: reinforce_pp, "),
        ("kl_placement", "instantaneous", "algorithm.kl_placement=instantaneous must be one of: to_go, "),
        ("loss_aggregation", "token-mean", "algorithm.loss_aggregation=token-mean must be one of: token_mean, "),
        ("importance_correction", "tis", "algorithm.importance_correction=tis must be one of: off, truncated, "),
        ("variance_ddof", 3, "algorithm.variance_ddof=3 must be 0 or 1"),
    ],
)
def test_a_value_that_no_code_knows_is_an_error_not_another_algorithm(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        algorithm_config("paper", **{key: value})


def test_overrides_replace_settings_of_a_preset_and_of_a_whole_configuration() -> None:
    config = algorithm_config("verl", dual_clip=0.0, kl_coef=0.5)
    assert (config.dual_clip, config.kl_coef, config.variance_ddof) == (0.0, 0.5, 1)
    assert algorithm_config(config) == config
    assert algorithm_config(config, kl_coef=0.1) == replace(config, kl_coef=0.1)


VERL = '[algorithm]\npreset = "verl"\n'
DUAL_CLIP = "[algorithm]\ndual_clip = 5.0\n"


@pytest.mark.parametrize("texts", [(VERL, DUAL_CLIP), (VERL + "dual_clip = 5.0\n",)])
def test_a_key_beside_or_after_the_preset_wins_over_it(tmp_path: Path, texts: tuple[str, ...]) -> None:
    assert load(tmp_path, *texts).algorithm == algorithm_config("verl", dual_clip=5.0)


def test_a_later_preset_replaces_what_earlier_files_said(tmp_path: Path) -> None:
    """Else a run's own config.toml, which holds every key, with another preset would keep all but its name."""
    resolved = dump_toml(load(tmp_path, VERL + "kl_coef = 0.5\nnum_samples_per_prompt = 16\n"))
    for found in (
        load(tmp_path, DUAL_CLIP, VERL),
        load(tmp_path, resolved, VERL),
        load(tmp_path, resolved, overrides=("--algorithm.preset=verl",)),
    ):
        assert replace(found.algorithm, num_samples_per_prompt=4) == algorithm_config("verl")
    assert found.algorithm.num_samples_per_prompt == 16, "no preset sets it"


def test_an_explicit_key_with_the_value_of_the_default_wins_too(tmp_path: Path) -> None:
    """dual_clip = 0 is what AlgorithmConfig has; set beside verl it turns verl's off."""
    assert load(tmp_path, VERL + "dual_clip = 0.0\n").algorithm == algorithm_config("verl", dual_clip=0.0)


def test_the_last_preset_is_the_one_that_counts(tmp_path: Path) -> None:
    """Nothing of the first is left: not verl's dual clip, nor its ddof."""
    grpo = '[algorithm]\npreset = "grpo"\n'
    assert load(tmp_path, VERL, grpo).algorithm == algorithm_config("grpo")
    assert load(tmp_path, VERL, overrides=("--algorithm.preset=grpo",)).algorithm == algorithm_config("grpo")
    twice = ("--algorithm.preset=grpo", "--algorithm.preset=rloo")
    assert load(tmp_path, VERL, overrides=twice).algorithm == algorithm_config("rloo")


def test_the_command_line_wins_over_files_and_preset(tmp_path: Path) -> None:
    overrides = ("--algorithm.dual_clip=7", "--algorithm.kl_coef=0.2", "--algorithm.preset=verl")
    found = load(tmp_path, DUAL_CLIP, overrides=overrides).algorithm
    assert found == algorithm_config("verl", dual_clip=7.0, kl_coef=0.2)


def test_a_preset_changes_nothing_outside_its_section(tmp_path: Path) -> None:
    config = load(tmp_path, VERL, "[optimizer]\nlr = 1e-6\n")
    assert replace(config, algorithm=AlgorithmConfig()) == load(tmp_path, "[optimizer]\nlr = 1e-6\n")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_config_toml_of_a_run_reads_back_equal(tmp_path: Path, preset: str) -> None:
    config = load_config([], [f"--algorithm.preset={preset}", "--algorithm.entropy_coef=0.25"])
    assert load(tmp_path, dump_toml(config)) == config


def test_the_config_toml_of_a_run_outlives_a_change_of_its_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming with a newer release must not change the algorithm of a run."""
    config = load_config([], ["--algorithm.preset=verl"])
    monkeypatch.setattr("megatron_rpp.config.presets.PRESETS", {**PRESETS, "verl": {"dual_clip": 9.0}})
    assert load_config([], ["--algorithm.preset=verl"]).algorithm.dual_clip == 9.0
    assert load(tmp_path, dump_toml(config)) == config


def test_the_document_has_every_setting_of_every_preset() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    _, opened, rest = text.partition("<!-- presets -->")
    table, closed, _ = rest.partition("<!-- /presets -->")
    assert opened and closed, "docs/algorithm.md must hold <!-- presets --> and <!-- /presets -->"
    assert table.strip() == presets_table(), "paste what `python -m tests.unit.config.test_presets` prints"


def test_the_table_marks_what_differs_from_the_paper_and_nothing_else() -> None:
    lines = presets_table().splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header == ["key", *PRESETS] and len(lines) == len(KEYS) + 2
    rows = {line.split("`")[1]: [cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines[2:]}
    dual_clip = dict(zip(PRESETS, rows["dual_clip"], strict=True))
    assert (dual_clip["paper"], dual_clip["verl"], dual_clip["grpo"]) == ("0", "**3**", "0")
    bold = {(key, name) for key, row in rows.items() for name, cell in zip(PRESETS, row, strict=True) if "**" in cell}
    assert bold == {(key, name) for name, changes in PRESETS.items() for key in changes}


if __name__ == "__main__":
    print(presets_table())  # noqa: T201
