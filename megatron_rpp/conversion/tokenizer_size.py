"""How many token ids a directory's tokenizer has, from its files alone: transformers takes seconds to import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def require_tokenizer_fits(folder: Path, vocab_size: int) -> None:
    """ValueError where a tokenizer file has a token id that the model has no embedding for."""
    for file, largest in _largest_ids(folder):
        if largest >= vocab_size:
            raise ValueError(
                f"{file} has the token id {largest} and config.json says vocab_size={vocab_size}: the tokenizer is "
                "larger than the model; copy the model's own tokenizer, or resize its embeddings"
            )


def _largest_ids(folder: Path) -> Iterator[tuple[Path, int]]:
    for name, read in (("tokenizer.json", _fast), ("vocab.json", _values), ("added_tokens.json", _values)):
        file = folder / name
        if file.is_file():
            try:
                yield file, max(read(json.loads(file.read_text(encoding="utf-8"))), default=-1)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} is damaged: {error!r}; copy it again") from error
    file = folder / "tokenizer.model"
    if file.is_file():
        yield file, _sentencepiece(file)


def _fast(raw: Any) -> Iterator[int]:
    """Of tokenizer.json: most models map tokens to ids, Unigram lists tokens with scores."""
    vocab = raw["model"].get("vocab", {})
    yield from vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    yield from (int(token["id"]) for token in raw.get("added_tokens") or ())


def _values(raw: dict[str, int]) -> Iterator[int]:
    yield from raw.values()


def _sentencepiece(file: Path) -> int:
    import sentencepiece

    try:
        return int(sentencepiece.SentencePieceProcessor(model_file=str(file)).vocab_size()) - 1
    except (OSError, RuntimeError):
        return -1  # also the name of tiktoken files, which do not tell their special tokens
