"""Multi-token prediction: the layers behind the last one, which hub checkpoints of DeepSeek-V3 and GLM-4.5 hold.

Training leaves them alone; conversion gives them Megatron's names. transformers neither reads nor writes
them, though its config.json may claim them, so that what is stored decides (`stored_mtp`). An MTP layer
repeats the embedding and the output weights, which Megatron has once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_mapping.table import Family, Rule, with_rules
from megatron_rpp.model.hf_mapping.transforms import Copied, Vocab

CONFIG_KEY = "num_nextn_predict_layers"
EMBEDDING, HEAD = "embed_tokens.weight", "shared_head.head.weight"  # copies of the main ones
MEGATRON_KEY = "mtp.layers."
_DECODER = "decoder.layers.{i}."
_LAYER_NAMES = ("transformer_layer", "mtp_model_layer")  # in megatron-core 0.16 and in later ones
_OWN = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"}


def with_mtp(family: Family, hf: HFConfig) -> Family:
    """`family` with the rules of `hf`'s MTP layers, whose parts are those of its last layer."""
    if not hf.num_mtp_layers:
        return family
    of_layer = [r for r in family.rules if r.megatron.startswith(_DECODER) and hf.num_layers - 1 in r.layers(hf)]
    own: list[Rule] = []
    for k in range(hf.num_mtp_layers):
        prefix, hf_prefix = f"{MEGATRON_KEY}{k}.", _hf_prefix(hf, k)
        own += [Rule(f"{prefix}{m}.weight", (f"{hf_prefix}{name}.weight",)) for m, name in _OWN.items()]
        for rule in of_layer:
            names = tuple(name.replace("{i}", str(hf.num_layers + k)) for name in rule.hf)
            rest = rule.megatron.removeprefix(_DECODER)
            own += [Rule(f"{prefix}{layer}.{rest}", names, rule.transform) for layer in _LAYER_NAMES]
    return replace(family, rules=with_rules(family.rules, *own, *_shared(hf)))


def _shared(hf: HFConfig) -> list[Rule]:
    """The main embedding and output weights, with their copies."""
    rules = []
    for name, main in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        names = (main, *(copy for copy, of in mtp_copies(hf).items() if of == main))
        rules.append(Rule(name, names, Copied(Vocab(), len(names))))
    return rules


def mtp_copies(hf: HFConfig) -> dict[str, str]:
    """Each copy in the MTP layers of `hf`, and the tensor that it repeats."""
    head = "model.embed_tokens.weight" if hf.tied_embeddings else "lm_head.weight"
    of = {EMBEDDING: "model.embed_tokens.weight", HEAD: head}
    return {_hf_prefix(hf, k) + leaf: of[leaf] for k in range(hf.num_mtp_layers) for leaf in hf.mtp_copies}


def stored_mtp(hf: HFConfig, names: Collection[str]) -> HFConfig:
    """`hf` with the MTP layers of config.json that a directory holds; `names` are Hugging Face's or Megatron's."""
    held = 0  # config.json may claim more than there are, or deny them
    while any(n.startswith((f"{_hf_prefix(hf, held)}eh_proj.", f"{MEGATRON_KEY}{held}.")) for n in names):
        held += 1
    hf = replace(hf, num_mtp_layers=held)
    if any(name.startswith(MEGATRON_KEY) for name in names):
        return hf
    return replace(hf, mtp_copies=tuple(leaf for leaf in hf.mtp_copies if _hf_prefix(hf, 0) + leaf in names))


def without_mtp(hf: HFConfig) -> HFConfig:
    """`hf` with its MTP layers dropped."""
    return replace(hf, num_mtp_layers=0)


def is_mtp(name: str, hf: HFConfig) -> bool:
    """Whether a Hugging Face tensor belongs to an MTP layer."""
    return any(name.startswith(_hf_prefix(hf, k)) for k in range(hf.num_mtp_layers))


def _hf_prefix(hf: HFConfig, k: int) -> str:
    return f"model.layers.{hf.num_layers + k}."
