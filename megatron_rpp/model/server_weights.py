"""What the servers hold of the policy: the dtype of weight_sync.dtype=auto, and the layers that stay in bfloat16.

FP8 leaves the trainer where its recipe quantizes as servers do, in blocks of 128 x 128, and its blocks are theirs:
Megatron joins matrices that Hugging Face stores apart, and cuts them over TP ranks, and a block that crosses a seam
or a cut has another scale than the engine's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from megatron_rpp.config.schema import Config
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_io.fp8_blocks import BLOCK
from megatron_rpp.model.hf_mapping import read_hf_config


def server_weights(config: Config) -> tuple[str, Collection[int]]:
    """(`server_dtype`, `kept_layers`) by the config.json of model.path, which is not looked at without FP8 training."""
    if not config.fp8.is_on:
        return _without_training(config), ()
    hf = read_hf_config(config.model.path)
    return server_dtype(config, hf), kept_layers(config, hf)


def server_dtype(config: Config, hf: HFConfig) -> str:
    """Type of the servers' weights: float32, bfloat16 or float8. The same on every host."""
    is_float8 = config.fp8.recipe == "blockwise" and why_not_float8(config, hf) is None
    return "float8" if is_float8 and config.weight_sync.dtype == "auto" else _without_training(config)


def _without_training(config: Config) -> str:
    return config.model.dtype if config.weight_sync.dtype == "auto" else config.weight_sync.dtype


def kept_layers(config: Config, hf: HFConfig) -> Collection[int]:
    """The layers that fp8 keeps in bfloat16: on the servers, too, where the rest is float8."""
    if not config.fp8.is_on:
        return ()
    first, last = config.fp8.bf16_first_layers, hf.num_layers - config.fp8.bf16_last_layers
    return [layer for layer in range(hf.num_layers) if layer < first or layer >= last]


def why_not_float8(config: Config, hf: HFConfig) -> str | None:
    """Why weight_sync.dtype=auto gives servers no float8 weights where there is FP8 training; None: nothing is in the
    way."""
    rollout = config.rollout
    if config.fp8.is_on and (rollout.urls or rollout.urls_file):
        return f"what servers of rollout.{'urls' if rollout.urls else 'urls_file'} were started with is not known"
    return why_other_values(config, hf)


def why_other_values(config: Config, hf: HFConfig) -> str | None:
    """Why servers with float8 weights would compute with other values than the trainer does; None: they would not.

    Without FP8 training there is nothing to be equal to.
    """
    recipe = config.fp8.recipe
    if recipe == "none":
        return None
    if recipe != "blockwise":
        return f"fp8.recipe={recipe} has other scales than the servers' blocks of 128 x 128"
    for name, size in _uncut_sizes(config, hf):
        if size % BLOCK[0]:
            return f"{name}={size} is no multiple of {BLOCK[0]}, so that blocks of trainer and servers are not the same"
    return None


def _uncut_sizes(config: Config, hf: HFConfig) -> Iterator[tuple[str, int]]:
    """Where matrices are joined or cut, by the trainer's ranks and a server's: (what it is, rows or columns)."""
    parallel, server = config.parallel, config.rollout.server_tensor
    yield "hidden_size", hf.hidden_size
    widths = [("intermediate_size", hf.ffn_hidden_size, "parallel.tensor", parallel.tensor)]
    if hf.moe is not None:
        moe = hf.moe
        widths = [] if all(moe.layers) else widths
        widths.append(("an expert's width", moe.ffn_hidden_size, "parallel.expert_tensor", parallel.expert_tensor))
        widths.append(("the shared experts' width", moe.shared_ffn_hidden_size, "parallel.tensor", parallel.tensor))
    heads = hf.num_attention_heads
    if hf.mla is None:
        yield "head_dim", hf.head_dim
    else:
        mla = hf.mla
        yield "q_lora_rank", mla.q_lora_rank or 0
        yield "kv_lora_rank", mla.kv_lora_rank
        rows = (mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.qk_nope_head_dim + mla.v_head_dim, mla.v_head_dim)
        widths += [(f"{heads} heads of {row}", heads * row, "parallel.tensor", parallel.tensor) for row in rows]
    for name, size, key, ranks in widths:
        yield f"{name} / {key}", size // ranks
        yield f"{name} / rollout.server_tensor", size // server
