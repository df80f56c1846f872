"""Small tokenizers, written to a directory: one of characters, and trained sentencepiece models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<bos>", "<eos>")
CHARACTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789+= \n:ANSWER")

# name: special pieces aside, what a sentencepiece model does to text before it looks for pieces
NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True},
    "default": {},  # nmt_nfkc, one space between words, no bytes
    "gemma": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
    },
}
# Holds what names of bytes are made of, so that they are text to the model.
CORPUS = [f"{i} plus {j} is {i + j}. <xAF> [y] café  def f(x):" for i in range(25) for j in range(25)]


def write_fast(directory: Path, *special: str, template: str | None = None, bos: bool = False) -> dict[str, int]:
    """A Hugging Face tokenizer of one token a character; with `bos`, its rules put <bos> in front. Its ids."""
    ids = {token: i for i, token in enumerate(dict.fromkeys((*SPECIAL, *special, *CHARACTERS)))}
    raw = RawTokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return ids


def write_sentencepiece(
    directory: Path, kind: str, normalization: str = "llama", *, lines: Iterable[str] = (), **settings: Any
) -> Path:
    """`tokenizer.model` of a `bpe` or `unigram` model, and a config.json that names its BOS and EOS.

    Trained on CORPUS and `lines`, with sentencepiece's `settings`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    corpus = directory / "corpus.tmp"
    corpus.write_text("\n".join((*CORPUS, *lines)), encoding="utf-8")
    symbols = {"control_symbols": ["[INST]"], "user_defined_symbols": ["<think>"]}
    sentencepiece.SentencePieceTrainer.train(
        **{"input": str(corpus), "model_prefix": str(directory / "tokenizer"), "model_type": kind, "minloglevel": 2},
        **{"vocab_size": 380, "hard_vocab_limit": False, **symbols, **NORMALIZATIONS[normalization], **settings},
    )
    corpus.unlink()
    (directory / "tokenizer.vocab").unlink()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
