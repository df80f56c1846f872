"""A prompt and its response as the tokens that a reward model reads, by its own tokenizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rpp.experience.chat import Chat, turns_of
from megatron_rpp.reward.protocol import RewardError


class ConversationTokenizer:
    """The user's turn and the assistant's in the chat template; where there is none, both texts and an end token.

    The template writes a BOS itself where the model has one; without, the tokenizer's own rules put it there.
    """

    def __init__(self, path: str) -> None:
        """path: directory of the reward model; code in it is not run. Raises ValueError for its tokenizer."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception for a broken file
            raise ValueError(f"reward.model_path={path}: its tokenizer cannot be loaded: {error}") from error
        self._rows = int(json.loads((Path(path) / "config.json").read_text()).get("vocab_size", sys.maxsize))

    def encode(self, pairs: Sequence[tuple[Chat, str]]) -> list[list[int]]:
        """Token ids of each (prompt, response). Raises RewardError for an id that the model has no embedding of."""
        has_template, end = bool(self._tokenizer.chat_template), self._tokenizer.eos_token_id
        texts = [self._text(asked, response) for asked, response in pairs]
        found = self._tokenizer(texts, add_special_tokens=not has_template)["input_ids"]
        conversations = [list(ids) for ids in found]
        if not has_template and end is not None:
            conversations = [ids if ids[-1:] == [end] else [*ids, end] for ids in conversations]
        last = max((max(ids) for ids in conversations if ids), default=0)
        if last >= self._rows:  # SGLang's scheduler would end
            raise RewardError(
                f"reward.model_path: its tokenizer gives the token {last}, and the model's vocab_size is {self._rows}; "
                "use the tokenizer that belongs to the model"
            )
        return conversations

    def shortened(self, asked: Chat, response: str, limit: int) -> list[int]:
        """As `encode`, with as much of the response as fits into `limit` tokens; what follows it is kept.

        Raises RewardError where the prompt alone does not fit.
        """
        tokens = self._tokenizer(response, add_special_tokens=False)["input_ids"]
        keep = len(tokens)
        while True:
            (ids,) = self.encode([(asked, self._tokenizer.decode(tokens[:keep]))])
            if len(ids) <= limit:
                return ids
            if keep == 0:
                raise RewardError(
                    f"a prompt alone is {len(ids)} tokens of the reward model, whose servers take {limit}; leave it "
                    "out, or raise the servers' --context-length"
                )
            keep = max(keep - (len(ids) - limit), 0)

    def _text(self, asked: Chat, response: str) -> str:
        turns = turns_of(asked)
        if self._tokenizer.chat_template:
            turns.append({"role": "assistant", "content": response})
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        return "\n\n".join(str(turn["content"]) for turn in turns) + response
