"""A tokenizer that `transformers` loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from megatron_rpp.data.chat import check_template_args, plain_texts
from megatron_rpp.data.special_tokens import end_ids, pad_id, read_json, turn_end_token
from megatron_rpp.experience.chat import Chat, turns_of

# With transformers 4, and with SGLang, these add a BOS unless add_bos_token is false. transformers 5 drops that key
# beside a tokenizer.json, and then the models that say it there alone (DeepSeek) lose their BOS.
_ADD_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
_PROBE = "a"


class HuggingFaceTokenizer:
    """A tokenizer that `transformers` loads from a local directory."""

    def __init__(
        self, path: Path, *, trust_remote_code: bool = False, chat_template_args: Mapping[str, Any] | None = None
    ) -> None:
        self._path = path
        self._tokenizer = _load(path, trust_remote_code)
        self._template_args = dict(chat_template_args or {})
        check_template_args(self._template_args, self._tokenizer.chat_template, path)
        special = {str(token): int(i) for i, token in self._tokenizer.added_tokens_decoder.items()}
        # Ids may have holes (added tokens far behind the vocabulary), so the count is not enough.
        self.vocab_size = 1 + max(len(self._tokenizer) - 1, *self._tokenizer.get_vocab().values())
        self.eos_token_ids = end_ids(path, self._tokenizer.eos_token_id, self._turn_end(special))
        self.pad_token_id = pad_id(
            path, self._tokenizer.pad_token_id, special, self._tokenizer.unk_token_id, self.eos_token_ids
        )
        self._prefix = self._text_prefix()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            return [self.encode(text) for text in texts]
        batch = self._tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in batch]

    def encode_prompts(self, prompts: Sequence[Chat], *, chat: bool) -> list[list[int]]:
        if chat:
            return self.encode_many([self.render_chat(prompt) for prompt in prompts])
        return [with_prefix(self._prefix, ids) for ids in self.encode_many(plain_texts(prompts))]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render_chat(self, chat: Chat) -> str:
        if not self._tokenizer.chat_template:
            raise ValueError(f"{self._path}: this tokenizer has no chat template; set data.chat_template = false")
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns_of(chat), tokenize=False, add_generation_prompt=True, **self._template_args
            )
        except TemplateError as error:
            raise ValueError(f"{self._path}: the chat template refuses {turns_of(chat)}: {error}") from error
        return str(rendered)

    def apply_chat_template(self, chat: Chat) -> list[int]:
        return self.encode(self.render_chat(chat))

    def _turn_end(self, special: dict[str, int]) -> int | None:
        if not self._tokenizer.chat_template:
            return None
        token = turn_end_token(
            lambda turns: str(self._tokenizer.apply_chat_template(turns, tokenize=False, **self._template_args)),
            special,
            never=(str(self._tokenizer.bos_token or ""),),
        )
        return None if token is None else special[token]

    def _text_prefix(self) -> list[int]:
        """What the tokenizer puts in front of plain text: a BOS, or nothing."""
        config = read_json(self._path / "tokenizer_config.json")
        name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
        bos = self._tokenizer.bos_token_id
        if name in _ADD_BOS and config.get("add_bos_token") is not False and bos is not None:
            return [int(bos)]
        plain = self.encode(_PROBE)
        whole = list(self._tokenizer.encode(_PROBE, add_special_tokens=True))
        starts = range(len(whole) - len(plain) + 1)
        return next((whole[:i] for i in starts if whole[i : i + len(plain)] == plain), [])


def with_prefix(prefix: list[int], ids: list[int]) -> list[int]:
    """`ids` behind `prefix`, unless the text wrote it itself: a BOS never comes twice."""
    return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]


def _load(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if not trust_remote_code and _is_written_in_remote_code(path):
        raise ValueError(_remote_code_message(path))
    try:
        # Never None, which would ask on the terminal.
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(_remote_code_message(path)) from error
        raise ValueError(f"{path}: transformers cannot load the tokenizer here: {error}") from error


def _is_written_in_remote_code(path: Path) -> bool:
    """Its class is the directory's own: transformers would silently take another one."""
    import transformers

    config = read_json(path / "tokenizer_config.json")
    auto_map = config.get("auto_map")
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    name = str(config.get("tokenizer_class") or "")
    standard = name and any(hasattr(transformers, n) for n in (name, name.removesuffix("Fast")))
    return bool(named) and not standard


def _remote_code_message(path: Path) -> str:
    return (
        f"{path / 'tokenizer_config.json'}: this tokenizer is Python code of the model's author; read it, "
        "then set model.trust_remote_code=true to run it, or give the model a tokenizer.json"
    )
