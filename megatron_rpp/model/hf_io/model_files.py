"""What a Hugging Face directory holds beside its weights: the one place that copies it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rpp.data.special_tokens import read_json
from megatron_rpp.data.tokenizer import TOKENIZER_FILES

logger = logging.getLogger(__name__)

_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*/*.jinja")  # additional_chat_templates/
_CODE = "*.py"
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Tell of the source's own weights: how they are quantized, which SGLang obeys, or what Megatron stored beside them.
_OF_WEIGHTS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "metadata.json", "run_state.json")
_FAST_FILES = ("tokenizer.json", "tokenizer_config.json")


def copy_model_files(
    source: Path,
    out: Path,
    *,
    dtype: str | None,
    quantization: dict[str, Any] | None = None,
    include_code: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Copy config and tokenizer of a model directory, never its weights.

    transformers and SGLang load the result as it stands: a raw sentencepiece model gets the tokenizer.json
    that it lacks.

    Args:
        source: a Hugging Face directory.
        out: where to; made if need be.
        dtype: what config.json is to name as the weights' type, `bfloat16` say; None leaves it.
        quantization: the quantization_config of the weights in `out`; None where they are not quantized,
            whatever the source's were.
        changes: keys of config.json that say otherwise in `out`.
        include_code: also the Python files, for a model that needs trust_remote_code.

    Raises:
        ValueError: config.json is missing, broken or names no architectures; the tokenizer cannot be made loadable.
        OSError: a file cannot be read or written.
    """
    config = _read_config(source / "config.json")
    has_tokenizer = any((source / name).is_file() for name in TOKENIZER_FILES)
    if not has_tokenizer:
        logger.warning("%s holds no tokenizer, so %s gets none", source, out)
    out.mkdir(parents=True, exist_ok=True)
    for file in _files_to_copy(source, include_code):
        target = out / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)  # contents alone: a read-only source must not make a read-only copy
    _set_weights(config, dtype, quantization)
    config |= changes or {}
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    if has_tokenizer and not any((source / name).is_file() for name in _FAST_FILES):
        from megatron_rpp.data.sentencepiece_export import write_fast_tokenizer

        write_fast_tokenizer(source, out)


def copied_bytes(source: Path) -> int:
    """Size of what copy_model_files copies, but for the tokenizer files that it may have to make."""
    return sum(file.stat().st_size for file in (*_files_to_copy(source, False), source / "config.json"))


def _files_to_copy(source: Path, include_code: bool) -> Iterator[Path]:
    for pattern in (*_PATTERNS, _CODE) if include_code else _PATTERNS:
        for file in sorted(source.glob(pattern)):
            skipped = file.name == "config.json" or file.name.endswith(".index.json")
            hidden = file.relative_to(source).parts[0].startswith(".")
            if file.is_file() and not skipped and not hidden and file.name not in _OF_WEIGHTS:
                yield file


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give a Hugging Face model directory")
    config = read_json(file)
    if not config.get("architectures"):
        raise ValueError(f"{file}: names no architectures, so nothing could load the model; add them")
    return config


def _set_weights(config: dict[str, Any], dtype: str | None, quantization: dict[str, Any] | None) -> None:
    """Make `config` describe the weights that lie beside it, in `config` itself."""
    for key in _QUANTIZATION_KEYS:
        config.pop(key, None)
    if quantization is not None:
        config["quantization_config"] = quantization
    if dtype is not None:
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
            config[key] = dtype
