"""The rules of a raw sentencepiece model as a tokenizer of the `tokenizers` library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rpp.data.sentencepiece_tokenizer import SentencePieceTokenizer

_SPACE = "\u2581"  # how sentencepiece writes a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_ALL = 1 << 30  # spaces to strip
# Score of a piece that no text may match: controls, bytes. `tokenizers` scores unknown characters just below the
# worst piece, so a literal <0x0A> still matches in a model that knows no `<`.
_NEVER = -1e6


def to_fast_tokenizer(file: Path, tokenizer: SentencePieceTokenizer) -> Any:
    """The `tokenizers.Tokenizer` that does what `tokenizer`, of the sentencepiece model `file`, does.

    ValueError where that library has no counterpart for the model's kind.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    kind = proto.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(
            f"{file}: only unigram and BPE models with spaces in front of words can be "
            "exported; put the model's own tokenizer.json and tokenizer_config.json beside it"
        )
    fast = Tokenizer(_unigram(proto) if kind == _UNIGRAM else _bpe(proto))
    fast.normalizer = _normalizer(proto)
    fast.decoder = _decoder(proto.normalizer_spec)
    # A user-defined piece is cut out of the normalized text, so that the space in front is put there once.
    added = {_CONTROL: (True, False), _UNKNOWN: (True, False), _USER_DEFINED: (False, True)}
    for piece in proto.pieces:
        if piece.type in added:
            special, normalized = added[piece.type]
            fast.add_tokens([AddedToken(piece.piece, special=special, normalized=normalized)])
    if tokenizer.text_prefix:
        fast.post_processor = _bos_in_front(tokenizer)
    return fast


def _unigram(proto: Any) -> Any:
    from tokenizers import models

    vocabulary = [(piece.piece, piece.score if piece.type == _NORMAL else _NEVER) for piece in proto.pieces]
    spec = proto.trainer_spec
    return models.Unigram(vocabulary, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)


def _bpe(proto: Any) -> Any:
    from tokenizers import models

    spec = proto.trainer_spec
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    return models.BPE(
        vocabulary, list(_merges(proto)), unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback
    )


def _merges(proto: Any) -> Iterator[tuple[str, str]]:
    """sentencepiece joins any two neighbours that make a piece, best score first: each way to cut each piece."""
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    for piece in sorted(normal, key=normal.__getitem__, reverse=True):
        for cut in range(1, len(piece)):
            if piece[:cut] in normal and piece[cut:] in normal:
                yield piece[:cut], piece[cut:]


def _normalizer(proto: Any) -> Any:
    from tokenizers import Regex, normalizers

    spec, steps = proto.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        ends = Regex(rf"\A +|[ {_SPACE}]+\z")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        # Not Prepend: `tokenizers` normalizes the names of user-defined pieces too, and these must stay. So a
        # text that is such a name and nothing else lacks the space that sentencepiece gives it.
        defined = [re.escape(piece.piece) for piece in proto.pieces if piece.type == _USER_DEFINED]
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{'|'.join(defined)})?\z)"), _SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", _ALL if spec.remove_extra_whitespaces else 1, 0))
    return decoders.Sequence(steps)


def _bos_in_front(tokenizer: SentencePieceTokenizer) -> Any:
    from tokenizers import processors

    bos = tokenizer.named_tokens()["bos_token"]
    ids = [(bos, tokenizer.text_prefix[0])]
    return processors.TemplateProcessing(single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=ids)
