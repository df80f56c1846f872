"""What `rpp train --check`, `rpp sft --check` and `rpp launch` try of a run's prompts, with the tokenizer alone."""

from __future__ import annotations

from typing import Literal

from megatron_rpp.config.schema import Config


def check_prompts(config: Config, command: Literal["train", "sft"]) -> list[str]:
    """The first prompts of each source, through template and tokenizer: a line on each. Raises ValueError.

    Rows behind them are for the ranks, which tokenize all before they build anything.
    """
    from megatron_rpp.data.first_prompts import longest_demonstration, longest_prompts  # these import torch
    from megatron_rpp.data.tokenizer import check_vocabulary, tokenizer_of
    from megatron_rpp.model.hf_mapping import read_hf_config

    path = config.sft.init if command == "sft" else config.model.path
    tokenizer = tokenizer_of(config, path)
    check_vocabulary(tokenizer, read_hf_config(path).vocab_size, path)
    found = [longest_demonstration(config, tokenizer)] if command == "sft" else longest_prompts(config, tokenizer)
    return [str(longest) for longest in found]
