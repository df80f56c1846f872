"""Which parameter of an SGLang server each Hugging Face tensor becomes a part of.

A server merges projections: q, k and v become qkv_proj, gate and up gate_up_proj, all experts of a layer one
w13_weight and one w2_weight. Each is its parts one behind the other along dimension 0, every part cut by TP
before it is joined. The names are those of SGLang 0.5.23; a test holds them against its own model classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_mapping.mtp import is_mtp
from megatron_rpp.weight_sync.server_cuts import Axis

_KNOWN = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Glm4ForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"),
    *("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
)
_IN_LAYER = re.compile(r"(?P<layer>model\.layers\.\d+)\.(?P<module>.+)\.(?P<leaf>[^.]+)")
_EXPERT = re.compile(r"(?P<moe>.*)\.experts\.(?P<e>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_PLACE_IN_W13 = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}


@dataclass(frozen=True)
class Part:
    """One of the pieces that a server parameter is joined of."""

    parameter: str  # its name on the server
    index: int = 0  # this piece's place in it
    count: int = 1  # of its pieces
    axis: Axis | None = None  # what TP divides; None: every rank holds the whole tensor
    dim: int = 0  # along which
    rows: tuple[int, int] = (0, 1)  # which share of the HF tensor's rows it is, and of how many
    plus_one: bool = False
    dtype: torch.dtype | None = None  # in which the server keeps it; None: the engine's

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's values, before TP cuts them."""
        share, shares = self.rows
        piece = tensor if shares == 1 else tensor.chunk(shares)[share]
        piece = piece + 1.0 if self.plus_one else piece
        return piece if self.dtype is None else piece.to(self.dtype)


class ServerLayout:
    """The parts of every Hugging Face tensor of one model. Raises ConfigError for a model it does not know."""

    def __init__(self, hf: HFConfig) -> None:
        if hf.architecture not in _KNOWN:
            raise ConfigError(
                f"weights of {hf.architecture} on an SGLang server cannot be verified: SGLang 0.5.23 has no model "
                "class of its own for it; set weight_sync.verify=off"
            )
        self._hf = hf
        self._modules = _attention(hf) | _mlp("mlp.")
        self._modules |= _mlp("mlp.shared_experts.", Axis.SHARED_FFN)

    def parts(self, name: str) -> tuple[Part, ...]:
        """What the server makes of HF tensor `name`; nothing where it holds no such tensor."""
        if is_mtp(name, self._hf) or (name == "lm_head.weight" and self._hf.tied_embeddings):
            return ()
        if (found := _EXPERT.fullmatch(name)) is not None:
            return (self._expert(found["moe"], int(found["e"]), found["leaf"]),)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return (self._vocabulary(name),)
        if name.endswith(".mlp.gate_up_proj.weight"):  # GLM-4: merged already
            return tuple(Part(name, i, 2, Axis.FFN, rows=(i, 2)) for i in range(2))
        in_layer = _IN_LAYER.fullmatch(name)
        template = self._modules.get(in_layer["module"]) if in_layer else None
        if in_layer is not None and template is not None:
            axis = None if in_layer["leaf"] == "bias" and template.dim == 1 else template.axis
            parameter = f"{in_layer['layer']}.{template.parameter}.{in_layer['leaf']}"
            return (replace(template, parameter=parameter, axis=axis),)
        return self._replicated(name)

    def _expert(self, moe: str, expert: int, leaf: str) -> Part:
        assert self._hf.moe is not None, "an expert's tensor in a model without experts"
        count = self._hf.moe.num_experts
        if leaf in _PLACE_IN_W13:
            place = 2 * expert + _PLACE_IN_W13[leaf]
            return Part(f"{moe}.experts.w13_weight", place, 2 * count, Axis.FFN)
        return Part(f"{moe}.experts.w2_weight", expert, count, Axis.FFN, dim=1)

    def _vocabulary(self, name: str) -> Part:
        # Gemma 3 has torch's own embedding there, neither cut nor padded.
        is_plain = self._hf.architecture == "Gemma3ForCausalLM" and name != "lm_head.weight"
        return Part(name, axis=None if is_plain else Axis.VOCABULARY)

    def _replicated(self, name: str) -> tuple[Part, ...]:
        """Norms, routers and their biases."""
        if self._hf.architecture == "Gemma2ForCausalLM" and name.endswith("norm.weight"):
            # SGLang's GemmaRMSNorm keeps 1 + weight beside it, and reports both.
            return Part(name), Part(name.removesuffix("weight") + "gemma_weight", plus_one=True)
        in_float32 = name.endswith(".e_score_correction_bias") or (
            self._hf.architecture == "Glm4MoeForCausalLM" and name.endswith(".mlp.gate.weight")
        )
        return (Part(name, dtype=torch.float32 if in_float32 else None),)


def _attention(hf: HFConfig) -> dict[str, Part]:
    own = "self_attn."
    parts = {f"{own}o_proj": Part(f"{own}o_proj", axis=Axis.HEADS, dim=1)}
    if hf.mla is None:
        axes = (Axis.HEADS, Axis.KV_HEADS, Axis.KV_HEADS)
        return parts | {
            f"{own}{leaf}_proj": Part(f"{own}qkv_proj", i, 3, axis)
            for i, (leaf, axis) in enumerate(zip("qkv", axes, strict=True))
        }
    cut = ("kv_b_proj", "q_proj") if hf.mla.q_lora_rank is None else ("kv_b_proj", "q_b_proj")
    parts |= {f"{own}{leaf}": Part(f"{own}{leaf}", axis=Axis.HEADS) for leaf in cut}
    if hf.mla.q_lora_rank is not None:
        down = ("q_a_proj", "kv_a_proj_with_mqa")
        parts |= {f"{own}{leaf}": Part(f"{own}fused_qkv_a_proj_with_mqa", i, 2) for i, leaf in enumerate(down)}
    return parts


def _mlp(own: str, axis: Axis = Axis.FFN) -> dict[str, Part]:
    return {
        f"{own}gate_proj": Part(f"{own}gate_up_proj", 0, 2, axis),
        f"{own}up_proj": Part(f"{own}gate_up_proj", 1, 2, axis),
        f"{own}down_proj": Part(f"{own}down_proj", axis=axis, dim=1),
    }


def derived(name: str, tensor: Tensor, hf: HFConfig) -> dict[str, Tensor]:
    """Server tensors that no HF tensor holds, and that follow from config.json; told when `name` passes."""
    if hf.architecture == "Gemma2ForCausalLM" and name == "model.embed_tokens.weight":
        scale = torch.tensor(hf.hidden_size**0.5, dtype=tensor.dtype, device=tensor.device)
        return {"model.normalizer": scale}
    return {}


def made_of(parameter: str) -> Sequence[str]:
    """The HF tensors behind a server parameter, for people to read; `*` is every expert."""
    merged = {
        ".fused_qkv_a_proj_with_mqa.": (".q_a_proj.", ".kv_a_proj_with_mqa."),
        ".qkv_proj.": (".q_proj.", ".k_proj.", ".v_proj."),
        ".gate_up_proj.": (".gate_proj.", ".up_proj."),
        ".block_sparse_moe.experts.w13_": (".block_sparse_moe.experts.*.w1.", ".block_sparse_moe.experts.*.w3."),
        ".block_sparse_moe.experts.w2_": (".block_sparse_moe.experts.*.w2.",),
        ".experts.w13_": (".experts.*.gate_proj.", ".experts.*.up_proj."),
        ".experts.w2_": (".experts.*.down_proj.",),
        ".gemma_weight": (".weight",),
    }
    for ours, theirs in merged.items():
        if ours in parameter:
            return [parameter.replace(ours, each) for each in theirs]
    return ["config.json's hidden_size"] if parameter == "model.normalizer" else [parameter]
