"""A raw sentencepiece model: a directory with `tokenizer.model` and no file of a Hugging Face tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from megatron_rpp.data.chat import check_template_args, plain_texts
from megatron_rpp.data.hf_tokenizer import with_prefix
from megatron_rpp.data.special_tokens import end_ids, pad_id, read_json, turn_end_token
from megatron_rpp.experience.chat import Chat, turns_of


class SentencePieceTokenizer:
    """Text is encoded by sentencepiece's own rules.

    The names of control pieces and of the unknown one stand for these pieces (`<s>` is BOS), as in
    transformers: a chat template can write them in no other way. Each stretch of text between two of them
    is encoded by itself, as Meta's Llama 2 code does with the turns of a dialogue.
    """

    def __init__(self, path: Path, *, chat_template_args: Mapping[str, Any] | None = None) -> None:
        import sentencepiece

        file = path / "tokenizer.model"
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{file}: not a sentencepiece model: {error}") from error
        self._path = path
        self.chat_template = read_chat_template(path)
        self._template_args = dict(chat_template_args or {})
        check_template_args(self._template_args, self.chat_template, path)
        self.vocab_size = int(self._model.vocab_size())
        ids = range(self.vocab_size)
        special = (i for i in ids if self._model.is_control(i) or self._model.is_unknown(i))
        self.special_tokens = {str(self._model.id_to_piece(i)): i for i in special}
        self._split = re.compile("({})".format("|".join(map(re.escape, _longest_first(self.special_tokens)))))
        self.eos_token_ids = end_ids(path, int(self._model.eos_id()), self._turn_end())
        own_pad, unknown = int(self._model.pad_id()), int(self._model.unk_id())
        self.pad_token_id = pad_id(path, own_pad, self.special_tokens, unknown, self.eos_token_ids)
        # A raw model does not say whether it was trained behind a BOS; its config.json names it if so.
        bos = int(self._model.bos_id())
        self.text_prefix = [bos] if bos >= 0 and read_json(path / "config.json").get("bos_token_id") == bos else []

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._split.split(text)):  # text, name, text, name, ..., text
            ids += [self.special_tokens[part]] if i % 2 else self._model.encode(part)
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_prompts(self, prompts: Sequence[Chat], *, chat: bool) -> list[list[int]]:
        if chat:
            return self.encode_many([self.render_chat(prompt) for prompt in prompts])
        return [with_prefix(self.text_prefix, self.encode(text)) for text in plain_texts(prompts)]

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self.special_tokens.values())
        return str(self._model.decode([int(i) for i in ids if i not in special]))

    def render_chat(self, chat: Chat) -> str:
        if self.chat_template is None:
            raise ValueError(
                f"{self._path}: there is no chat template beside tokenizer.model; add chat_template.jinja "
                "or set data.chat_template = false"
            )
        try:
            return self._render(turns_of(chat), add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"{self._path}: the chat template refuses {turns_of(chat)}: {error}") from error

    def apply_chat_template(self, chat: Chat) -> list[int]:
        return self.encode(self.render_chat(chat))

    def piece(self, token_id: int) -> str | None:
        """The name of a token; None below 0, which is how sentencepiece says that there is none."""
        return str(self._model.id_to_piece(token_id)) if 0 <= token_id < self.vocab_size else None

    def named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, unk_token and pad_token, as far as the model has them."""
        model = self._model
        ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
        return {f"{name}_token": piece for name, i in ids.items() if (piece := self.piece(int(i))) is not None}

    def _render(self, turns: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        # The function, and so the sandbox, in which transformers renders the exported directory's template.
        from transformers.utils.chat_template_utils import render_jinja_template

        names: dict[str, Any] = {**self.named_tokens(), **self._template_args}
        rendered: Any = render_jinja_template(
            [turns], chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, **names
        )
        return str(rendered[0][0])

    def _turn_end(self) -> int | None:
        if self.chat_template is None:
            return None
        bos = self.named_tokens().get("bos_token", "")
        token = turn_end_token(self._render, self.special_tokens, never=(bos,))
        return None if token is None else self.special_tokens[token]


def read_chat_template(path: Path) -> str | None:
    """chat_template.jinja, else the string in chat_template.json."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json(path / "chat_template.json").get("chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path / 'chat_template.json'}: chat_template is not a string")
    return template


def _longest_first(names: Sequence[str] | dict[str, int]) -> list[str]:
    return sorted(names, key=len, reverse=True)
