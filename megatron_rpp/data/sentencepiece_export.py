"""A raw sentencepiece model as `tokenizer.json`, which transformers and SGLang load as it stands.

transformers converts such a model by itself when it finds only `tokenizer.model`, but with other rules: without
sentencepiece's space in front, and with the literal text `<0x0A>` as a byte.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from megatron_rpp.data.sentencepiece_convert import to_fast_tokenizer
from megatron_rpp.data.sentencepiece_tokenizer import SentencePieceTokenizer

logger = logging.getLogger(__name__)

_PROBES = (
    *("Hello, world", " leading", "two  spaces ", "  ", "line\n\nline\n", "tab\tand\r\n", "12 + 345 = 357"),
    *("naïve café \ufb01 ½", "日本語 текст", "🙂👍🏽", "a\u00a0b\u200bc", "aaaaaaaaaa", "<0x0A> <unk> <s>a</s> b"),
    *("\\boxed{7}", "def f(x):\n    return x"),
)


def write_fast_tokenizer(source: Path, out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja of `source`'s tokenizer.model to `out`.

    `out` must hold config.json already. Warns if transformers then reads a probe text otherwise than
    sentencepiece does, which some normalization rules bring about. One difference is past help: a unigram model
    scores 222 as 22+2 and as 2+22 alike, and sentencepiece's float32 rounding picks one.

    Raises:
        ValueError: not a sentencepiece model, or one of a kind that has no counterpart.
    """
    tokenizer = SentencePieceTokenizer(source)
    to_fast_tokenizer(source / "tokenizer.model", tokenizer).save(str(out / "tokenizer.json"))
    names = tokenizer.named_tokens()
    ends = [tokenizer.piece(i) for i in tokenizer.eos_token_ids]
    if "eos_token" not in names and ends[0] is not None:
        names["eos_token"] = ends[0]
    # Of this class, transformers 4 and 5 and SGLang take tokenizer.json as it is; LlamaTokenizer rebuilds it.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    if tokenizer.chat_template is not None:
        (out / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    if (text := first_disagreement(tokenizer, out)) is not None:
        logger.warning("%s: transformers reads %r otherwise than tokenizer.model does; use the latter", out, text)


def first_disagreement(tokenizer: SentencePieceTokenizer, directory: Path) -> str | None:
    """The first probe text that transformers, from `directory`, encodes otherwise than `tokenizer`."""
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    named = (f"a {name}{name}b" for name in tokenizer.special_tokens)
    for text in (*_PROBES, *named):
        if theirs.encode(text, add_special_tokens=False) != tokenizer.encode(text):
            return text
    return None
