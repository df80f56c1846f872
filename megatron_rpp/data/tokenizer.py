"""One tokenizer interface over Hugging Face tokenizers and raw sentencepiece models.

Only local directories are read; nothing here asks the network, and no code of a directory runs unless asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_rpp.config.schema import Config
from megatron_rpp.experience.chat import Chat

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    eos_token_ids: tuple[int, ...]  # any of these ends a response; a demonstration ends with the first
    pad_token_id: int  # fills batches on the right, always behind a mask
    vocab_size: int  # ids are below this

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with no special tokens added in front or behind."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; fast for many."""
        ...

    def encode_prompts(self, prompts: Sequence[Chat], *, chat: bool) -> list[list[int]]:
        """Token ids of each prompt.

        With `chat`, each is a user's turn, or a conversation, in the chat template, which writes a BOS itself
        where the model has one. Without, each is plain text, behind the BOS that the tokenizer's own rules put
        there.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are skipped."""
        ...

    def render_chat(self, chat: Chat) -> str:
        """A user's turn, or a conversation, in the chat template, up to where the assistant's turn begins."""
        ...

    def apply_chat_template(self, chat: Chat) -> list[int]:
        """Token ids of `render_chat(chat)`."""
        ...


def tokenizer_of(config: Config, path: str | Path) -> Tokenizer:
    """That of the model at `path`, as `config` wants it. Raises ValueError as `load_tokenizer`."""
    return load_tokenizer(
        path,
        trust_remote_code=config.model.trust_remote_code,
        chat_template_args=config.data.chat_template_args,
    )


def load_tokenizer(
    path: str | Path, *, trust_remote_code: bool = False, chat_template_args: Mapping[str, Any] | None = None
) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, or of one that holds only `tokenizer.model`.

    Args:
        path: the directory.
        trust_remote_code: run the Python files in it, where the tokenizer is written in them.
        chat_template_args: what the chat template is given beside the conversation (data.chat_template_args).

    Raises:
        ValueError: there is no such directory, no tokenizer or end token in it, or only one that needs
            trust_remote_code; or its chat template does not read one of chat_template_args.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; set model.path to a Hugging Face directory")
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        from megatron_rpp.data.hf_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path, trust_remote_code=trust_remote_code, chat_template_args=chat_template_args)
    if (path / "tokenizer.model").is_file():
        from megatron_rpp.data.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(path, chat_template_args=chat_template_args)
    raise ValueError(
        f"{path}: no tokenizer here; copy the model's tokenizer.json (with tokenizer_config.json) "
        "or tokenizer.model into it"
    )


def check_vocabulary(tokenizer: Tokenizer, rows: int, path: str | Path) -> None:
    """Every id must have a row in the embedding.

    Args:
        tokenizer: of the directory `path`.
        rows: the model's vocab_size. It may be more than the tokenizer's: models pad it.

    Raises:
        ValueError: the tokenizer, or the end ids that generation_config.json or config.json add, reach past the rows.
    """
    file = next((f for name in TOKENIZER_FILES if (f := Path(path) / name).is_file()), Path(path))
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{file}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is {rows}; "
            "use the tokenizer that belongs to the model"
        )
    last = max(tokenizer.pad_token_id, *tokenizer.eos_token_ids)
    if last >= rows:
        raise ValueError(
            f"{path}: the end or padding token {last} is not below the model's vocab_size, which is {rows}; "
            "correct eos_token_id and pad_token_id in generation_config.json and config.json"
        )
