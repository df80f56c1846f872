"""A Hugging Face directory into shards and back, on stand-ins with the names and shapes of Megatron's stages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_rpp.model.build import Model
from megatron_rpp.model.export_hf import hf_tensors
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.load_hf import load_hf_weights
from megatron_rpp.model.shards import sharded_parameters
from tests.support.tiny_models import FAMILY_NAMES, MOE_FAMILY_NAMES, save_tiny

PADDED_VOCAB = 20
# Experts and latent attention are put to the same test on Megatron's own modules, in tests/distributed.
DENSE = [name for name in FAMILY_NAMES if name not in (*MOE_FAMILY_NAMES, "mla_dense")]


def module(mode: str | None, **shapes: tuple[int, ...]) -> nn.Module:
    """A leaf whose parameters are NaN until loaded; Transformer Engine's linear layers have a `parallel_mode`."""
    leaf = nn.Module()
    leaf.parallel_mode = mode
    for name, shape in shapes.items():
        leaf.register_parameter(name, nn.Parameter(torch.full(shape, torch.nan)))
    return leaf


def tree(**children: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


def layer(number: int, hf: HFConfig, tp: int) -> nn.Module:
    hidden, ffn = hf.hidden_size, hf.ffn_hidden_size // tp
    heads = hf.num_attention_heads * hf.head_dim // tp
    qkv = {"weight": (heads * 2, hidden), "layer_norm_weight": (hidden,)}  # 2 groups of 2 heads: q q k v
    if hf.qkv_bias:
        qkv["bias"] = (heads * 2,)
    norms = {f"{part}_layernorm": module(None, weight=(hf.head_dim,)) for part in "qk"} if hf.qk_norm else {}
    built = tree(
        self_attention=tree(
            linear_qkv=module("column", **qkv), linear_proj=module("row", weight=(hidden, heads)), **norms
        ),
        pre_mlp_layernorm=module(None, weight=(hidden,)),
        mlp=tree(linear_fc1=module("column", weight=(2 * ffn, hidden)), linear_fc2=module("row", weight=(hidden, ffn))),
    )
    if hf.post_norms:
        for name in ("self_attn_bda", "mlp_bda"):
            built.add_module(name, tree(norm=module(None, weight=(hidden,))))
    built.layer_number = number
    return built


def stage(hf: HFConfig, tp: int = 1, layers: range = range(4)) -> nn.Module:
    """The layers `layers` (from 0), with the embedding where the first is among them, the head with the last."""
    vocab = (PADDED_VOCAB // tp, hf.hidden_size)
    decoder = tree(layers=nn.ModuleList([layer(i + 1, hf, tp) for i in layers]))
    model = tree(decoder=decoder)
    if 0 in layers:
        model.add_module("embedding", tree(word_embeddings=module("column", weight=vocab)))
    if hf.num_layers - 1 in layers:
        decoder.add_module("final_layernorm", module(None, weight=(hf.hidden_size,)))
        if not (hf.tied_embeddings and 0 in layers):  # a tied model's last stage keeps its own copy
            model.add_module("output_layer", module("column", weight=vocab))
    model.share_embeddings_and_output_weights = hf.tied_embeddings
    return model


def load(chunks: list[nn.Module], path: Path, tp_rank: int = 0, tp_size: int = 1) -> None:
    group = SimpleNamespace(rank=lambda: tp_rank, size=lambda: tp_size)
    place: Any = SimpleNamespace(tp_group=group)
    load_hf_weights(chunks, read_hf_config(str(path)), str(path), place, dtype=torch.float32)


def export(ranks: list[nn.Module], hf: HFConfig) -> dict[str, Tensor]:
    """hf_tensors of rank 0, its all-gather answered from the other ranks' modules."""
    splits = [[s for s in sharded_parameters([r]) if s.dim is not None and not s.is_tied_copy] for r in ranks]
    answers: Iterator[list[Tensor]] = ([s.parameter.detach() for s in items] for items in zip(*splits, strict=True))
    model: Any = Model([ranks[0]], hf, None, SimpleNamespace(tp_group=None))  # type: ignore[arg-type]
    return dict(hf_tensors(model, gather=lambda shard, group, ranks=None: next(answers)))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", DENSE)
def test_load_then_export_is_bit_for_bit_the_checkpoint(family: str, tp: int, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    hf = read_hf_config(str(path))
    ranks = [stage(hf, tp) for _ in range(tp)]
    for rank, chunk in enumerate(ranks):
        load([chunk], path, rank, tp)
        assert not any(p.isnan().any() for p in chunk.parameters()), "a parameter was not filled"
    found, expected = export(ranks, hf), load_file(path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_later_stage_loads_the_layers_of_its_global_index(tmp_path: Path) -> None:
    """Its own layer 0 is layer 2 of the model."""
    path = save_tiny("llama", tmp_path)
    last = stage(read_hf_config(str(path)), layers=range(2, 4))
    load([last], path)
    expected = load_file(path / "model.safetensors")
    for i in (0, 1):
        loaded = last.decoder.layers[i].mlp.linear_fc2.weight
        assert torch.equal(loaded, expected[f"model.layers.{i + 2}.mlp.down_proj.weight"])


def test_the_last_stage_of_a_tied_model_gets_the_embedding_and_does_not_export_it(tmp_path: Path) -> None:
    path = save_tiny("qwen3", tmp_path)
    hf = read_hf_config(str(path))
    last = stage(hf, layers=range(2, 4))
    load([last], path)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(last.output_layer.weight[:19], embedding)
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & export([last], hf).keys()


def change(path: Path, name: str, value: Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors.pop(name)
    save_file(tensors if value is None else {**tensors, name: value}, path / "model.safetensors")


def test_a_missing_tensor_error_names_directory_and_tensor(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    name = "model.layers.2.mlp.up_proj.weight"
    change(path, name, None)
    with pytest.raises(ValueError) as error:
        load([stage(read_hf_config(str(path)))], path)
    assert str(path) in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (31,)),
        ("model.layers.1.self_attn.o_proj.weight", (32, 30)),
        ("model.layers.1.mlp.down_proj.weight", (32, 50)),
        ("model.layers.1.mlp.up_proj.weight", (50, 32)),
        ("model.layers.1.self_attn.q_proj.weight", (33, 32)),  # unflatten's own error
        ("model.layers.1.self_attn.k_proj.weight", (18, 32)),
        ("model.embed_tokens.weight", (24, 32)),  # new_zeros' own error
        ("model.embed_tokens.weight", (12, 32)),  # zero rows for real tokens
        ("lm_head.weight", (20, 32)),  # a row that config.json does not know
    ],
)
def test_a_wrong_shape_error_names_directory_and_tensor(
    name: str, shape: tuple[int, ...], tp: int, tmp_path: Path
) -> None:
    path = save_tiny("llama", tmp_path)
    change(path, name, torch.ones(shape))
    with pytest.raises(ValueError) as error:
        load([stage(read_hf_config(str(path)), tp)], path, 0, tp)
    assert str(path) in str(error.value) and name in str(error.value)


def test_a_parameter_without_a_rule_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    odd = stage(read_hf_config(str(path)))
    odd.decoder.layers[3].mlp.add_module("router", module(None, weight=(4, 32)))
    with pytest.raises(KeyError, match=r"decoder\.layers\.3\.mlp\.router\.weight"):
        load([odd], path)


@pytest.mark.parametrize("name", ["model.layers.4.mlp.up_proj.weight", "model.layers.0.mlp.router.weight"])
def test_a_tensor_that_the_architecture_does_not_have_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    """Left out in silence, a fifth layer or an adapter would give another model."""
    path = save_tiny("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, name: torch.ones(3)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        load([stage(read_hf_config(str(path)))], path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("what", ["copy", "other"])
def test_output_weights_beside_tied_embeddings_must_be_their_copy(what: str, tmp_path: Path) -> None:
    """transformers leaves a model untied whose two tensors differ."""
    path = save_tiny("qwen3", tmp_path)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": embedding + (what == "other")}, path / "model.safetensors")
    chunk = stage(read_hf_config(str(path)))
    if what == "copy":
        load([chunk], path)
        return
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load([chunk], path)
