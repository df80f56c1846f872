"""data.chat_template_args: what the configuration alone can tell, and what resuming compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpp.config import Config
from megatron_rpp.config.data import DataConfig
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.load import load_config
from megatron_rpp.config.templates import check_chat_template_args
from megatron_rpp.config.toml_text import dump_toml
from megatron_rpp.rollout.journal import fingerprint


def test_a_table_on_the_command_line_or_in_a_file_is_read_and_written_back(tmp_path: Path) -> None:
    config = load_config([], ["--data.chat_template=true", "--data.chat_template_args={enable_thinking = false}"])
    assert config.data.chat_template_args == {"enable_thinking": False}
    (tmp_path / "again.toml").write_text(dump_toml(config))
    assert load_config([str(tmp_path / "again.toml")], []).data == config.data
    check_chat_template_args(config.data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            DataConfig(chat_template_args={"a": 1}),
            r"data\.chat_template_args=\{\"a\" = 1\} must go with data\.chat_template=true",
        ),
        (
            DataConfig(chat_template=True, chat_template_args={"add_generation_prompt": False}),
            r"data\.chat_template_args\.add_generation_prompt is set by the trainer; leave it out",
        ),
    ],
)
def test_arguments_without_a_template_or_of_the_trainer_are_refused(data: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_chat_template_args(data)


def test_recorded_responses_are_not_those_of_other_arguments() -> None:
    plain, told = Config(), Config(data=DataConfig(chat_template_args={"enable_thinking": False}))
    assert fingerprint(plain) != fingerprint(told)
