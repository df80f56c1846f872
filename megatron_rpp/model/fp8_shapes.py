"""Do a model's matrices, as they are split over ranks, suit the FP8 recipe? Tells the first that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fp8_recipes import RULES
from megatron_rpp.config.schema import Config, ParallelConfig
from megatron_rpp.model.hf_config import MLA, HFConfig


@dataclass(frozen=True)
class Matrix:
    """One product's weight on one rank."""

    name: str
    outer: int  # output features
    inner: int  # input features
    split_by: str = "parallel.tensor"  # the key that divides it further


def check_fp8_shapes(config: Config, hf: HFConfig) -> None:
    """Raises ConfigError. The split itself is `checks.check_split`'s, and comes first."""
    fp8, parallel = config.fp8, config.parallel
    if not fp8.is_on:
        return
    most = hf.num_layers // parallel.pipeline
    for key in ("bf16_first_layers", "bf16_last_layers"):
        if getattr(fp8, key) > most:
            whole = f"num_hidden_layers={hf.num_layers} / parallel.pipeline={parallel.pipeline}"
            raise ConfigError(f"fp8.{key}={getattr(fp8, key)} must be at most {most}, {whole}: Megatron allows no more")
    kept = fp8.bf16_first_layers + fp8.bf16_last_layers
    if kept >= hf.num_layers:
        raise ConfigError(
            f"fp8.bf16_first_layers={fp8.bf16_first_layers} and fp8.bf16_last_layers={fp8.bf16_last_layers} leave none "
            f"of num_hidden_layers={hf.num_layers} for FP8; lower them, or set fp8.recipe=none"
        )
    rule = RULES[fp8.recipe]
    for matrix in fp8_matrices(hf, parallel):
        for side, size, multiple in (("output", matrix.outer, rule.outer), ("input", matrix.inner, rule.inner)):
            if size % multiple:
                raise ConfigError(
                    f"fp8.recipe={fp8.recipe} needs multiples of {multiple}, and {matrix.name} has {size} {side} "
                    f"features on a rank; {_advice(config, matrix, size, multiple)}"
                )


def fp8_matrices(hf: HFConfig, parallel: ParallelConfig) -> Iterator[Matrix]:
    """Of all layers alike, in the order of a layer; embedding, router and output layer stay in bfloat16."""
    yield from _attention(hf, parallel.tensor) if hf.mla is None else _latent_attention(hf, hf.mla, parallel.tensor)
    moe = hf.moe
    if moe is None or not all(moe.layers):
        yield from _mlp("", hf.hidden_size, hf.ffn_hidden_size // parallel.tensor)
    if moe is not None and any(moe.layers):
        width = moe.ffn_hidden_size // parallel.expert_tensor
        yield from _mlp("an expert's ", hf.hidden_size, width, "parallel.expert_tensor")
        if moe.shared_ffn_hidden_size:
            yield from _mlp("the shared expert's ", hf.hidden_size, moe.shared_ffn_hidden_size // parallel.tensor)


def _attention(hf: HFConfig, tensor: int) -> Iterator[Matrix]:
    heads, groups = hf.num_attention_heads, hf.num_query_groups
    yield Matrix("linear_qkv", (heads + 2 * groups) * hf.head_dim // tensor, hf.hidden_size)
    yield Matrix("linear_proj", hf.hidden_size, heads * hf.head_dim // tensor)


def _latent_attention(hf: HFConfig, mla: MLA, tensor: int) -> Iterator[Matrix]:
    """With Transformer Engine the down-projections are whole on every TP rank."""
    heads, hidden = hf.num_attention_heads // tensor, hf.hidden_size
    query = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if mla.q_lora_rank is None:
        yield Matrix("linear_q_proj", query, hidden)
    else:
        yield Matrix("linear_q_down_proj", mla.q_lora_rank, hidden)
        yield Matrix("linear_q_up_proj", query, mla.q_lora_rank)
    yield Matrix("linear_kv_down_proj", mla.kv_lora_rank + mla.qk_rope_head_dim, hidden)
    yield Matrix("linear_kv_up_proj", heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    yield Matrix("linear_proj", hidden, heads * mla.v_head_dim)


def _mlp(whose: str, hidden: int, width: int, split_by: str = "parallel.tensor") -> Iterator[Matrix]:
    """width: on one rank."""
    yield Matrix(f"{whose}linear_fc1", 2 * width, hidden, split_by)
    yield Matrix(f"{whose}linear_fc2", hidden, width, split_by)


def _advice(config: Config, matrix: Matrix, size: int, multiple: int) -> str:
    ranks = getattr(config.parallel, matrix.split_by.removeprefix("parallel."))
    if ranks > 1 and size * ranks % multiple == 0:
        return f"lower {matrix.split_by}={ranks}"
    least = RULES["tensorwise"]
    if multiple > least.inner and size % least.inner == 0:
        return "use fp8.recipe=tensorwise"
    return "set fp8.recipe=none"
