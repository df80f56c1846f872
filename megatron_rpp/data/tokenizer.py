"""One tokenizer interface over Hugging Face fast tokenizers and raw sentencepiece models.

Only local directories are read; nothing here asks the network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

CHATML_END = "<|im_end|>"


class Tokenizer(Protocol):
    """Text to token ids and back."""

    eos_token_ids: tuple[int, ...]  # any of these ends a response
    pad_token_id: int
    vocab_size: int  # ids are below this

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with no special tokens added in front or behind."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; fast for many."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are skipped."""
        ...

    def render_chat(self, text: str) -> str:
        """`text` as a user's turn in the chat template, up to where the assistant's turn begins."""
        ...

    def apply_chat_template(self, text: str) -> list[int]:
        """Token ids of `render_chat(text)`."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, or of one that holds only `tokenizer.model`.

    Raises:
        ValueError: there is no such directory, or no tokenizer or end token in it.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; set model.path to a Hugging Face directory")
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path)
    raise ValueError(
        f"{path}: no tokenizer here; copy the model's tokenizer.json (with tokenizer_config.json) "
        "or tokenizer.model into it"
    )


class HuggingFaceTokenizer:
    """A tokenizer that `transformers` loads from a local directory."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception for a broken file
            raise ValueError(f"{path}: transformers cannot load the tokenizer here: {error}") from error
        self._path = path
        self.vocab_size = len(self._tokenizer)
        self.eos_token_ids = _end_ids(path, self._tokenizer)
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_ids[0] if pad is None else pad

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            return [self.encode(text) for text in texts]
        batch = self._tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in batch]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render_chat(self, text: str) -> str:
        if not self._tokenizer.chat_template:
            raise ValueError(f"{self._path}: this tokenizer has no chat template; set data.chat_template = false")
        turn = [{"role": "user", "content": text}]
        return str(self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def apply_chat_template(self, text: str) -> list[int]:
        return self.encode(self.render_chat(text))


class SentencePieceTokenizer:
    """A raw sentencepiece model. It has no chat template."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path / 'tokenizer.model'}: not a sentencepiece model: {error}") from error
        self._path = path
        self.vocab_size = int(self._model.vocab_size())
        own_end = int(self._model.eos_id())
        self.eos_token_ids = _configured_end_ids(path) or ((own_end,) if own_end >= 0 else ())
        if not self.eos_token_ids:
            raise ValueError(_no_end_message(path))
        pad = int(self._model.pad_id())
        self.pad_token_id = pad if pad >= 0 else self.eos_token_ids[0]

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._model.encode(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        special = {self.pad_token_id, *self.eos_token_ids}
        kept = [int(i) for i in ids if i not in special and not self._model.is_control(int(i))]
        return str(self._model.decode(kept))

    def render_chat(self, text: str) -> str:
        raise ValueError(f"{self._path}: tokenizer.model has no chat template; set data.chat_template = false")

    def apply_chat_template(self, text: str) -> list[int]:
        return self.encode(self.render_chat(text))


def _end_ids(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """generation_config.json, else config.json, else the tokenizer; and <|im_end|> for ChatML."""
    ids = _configured_end_ids(path)
    if not ids and tokenizer.eos_token_id is not None:
        ids = (int(tokenizer.eos_token_id),)
    if CHATML_END in str(tokenizer.chat_template or ""):
        turn_end = tokenizer.convert_tokens_to_ids(CHATML_END)
        if isinstance(turn_end, int) and turn_end != tokenizer.unk_token_id and turn_end not in ids:
            ids = (turn_end, *ids)
    if not ids:
        raise ValueError(_no_end_message(path))
    return ids


def _configured_end_ids(path: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if not file.is_file():
            continue
        try:
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{file}: not a JSON object: {error}") from error
        if value is not None:
            return tuple(int(i) for i in value) if isinstance(value, list) else (int(value),)
    return ()


def _no_end_message(path: Path) -> str:
    return (
        f"{path}: no end-of-sequence token is known, so no response could ever stop; "
        "set eos_token_id in generation_config.json"
    )
