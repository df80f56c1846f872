"""Load a Hugging Face directory into this rank's shards, one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rpp.model.fp8_params import fill
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_io.tensors import HFTensors
from megatron_rpp.model.hf_mapping import family_of
from megatron_rpp.model.hf_mapping.mtp import stored_mtp, without_mtp
from megatron_rpp.model.hf_mapping.transforms import Shard
from megatron_rpp.model.shards import sharded_parameters
from megatron_rpp.parallel.context import ParallelContext


def load_hf_weights(
    chunks: Sequence[torch.nn.Module],
    hf: HFConfig,
    path: str,
    parallel: ParallelContext,
    *,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    mtp: str = "keep",
) -> None:
    """Fill every parameter of `chunks` from the directory `path`; FP8 weights become `dtype`.

    mtp: `keep` compares what the directory's MTP layers repeat of the model; `drop` does not.

    Raises ValueError that names a tensor which is missing, cannot be read, does not fit, or that the
    architecture does not have.
    """
    tensors = HFTensors(path, allow_pickle=allow_pickle, dequantized_dtype=dtype)
    hf = stored_mtp(hf, tensors.names)
    tensors.require_no_others(family_of(hf).hf_names(hf))
    hf = hf if mtp == "keep" else without_mtp(hf)
    family = family_of(hf)
    if parallel.tp_group.rank() == 0 and getattr(chunks[0], "pre_process", True):
        require_tied(tensors, hf)
    for item in sharded_parameters(chunks):
        # A tied model has no lm_head: the last stage's copy is the embedding.
        name = "embedding.word_embeddings.weight" if item.is_tied_copy else item.name
        rule, hf_names = family.find(name)
        group = parallel.etp_group if item.is_expert else parallel.tp_group
        shard = Shard(item.dim, group.rank(), group.size(), item.parameter.shape[0])
        parts = [tensors.read(n) for n in hf_names]
        try:
            value = rule.transform.split(parts, shard, hf)
            if value.shape != item.parameter.shape:
                wanted = tuple(item.parameter.shape)
                raise ValueError(f"they give {item.name} the shape {tuple(value.shape)} where {wanted} is needed")
        except (RuntimeError, ValueError) as error:
            found = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(hf_names, parts, strict=True))
            raise ValueError(f"{path}: {found} do not fit its config.json: {error}") from error
        fill(item.parameter, value)


def require_tied(tensors: HFTensors, hf: HFConfig) -> None:
    """ValueError where `hf` is tied and the directory stores output weights that are not the embedding.

    A copy is common. transformers leaves such a model untied; a Megatron model could not give them back.
    """
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if hf.tied_embeddings and head in tensors.names and not tensors.is_copy(head, embedding):
        raise ValueError(
            f"{tensors.path / tensors.file_of(head)}: {head} differs from {embedding}, though config.json says "
            "tie_word_embeddings=true; set that to false, or remove the tensor"
        )
