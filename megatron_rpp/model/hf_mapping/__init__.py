"""The one Hugging Face <-> Megatron name and shape table, a file a family."""

from megatron_rpp.model.hf_config import HFConfig, RawConfig
from megatron_rpp.model.hf_mapping.deepseek_v2 import DEEPSEEK_V2
from megatron_rpp.model.hf_mapping.deepseek_v3 import DEEPSEEK_V3
from megatron_rpp.model.hf_mapping.gemma2 import GEMMA2
from megatron_rpp.model.hf_mapping.gemma3 import GEMMA3
from megatron_rpp.model.hf_mapping.glm import GLM, GLM4
from megatron_rpp.model.hf_mapping.glm4_moe import GLM4_MOE
from megatron_rpp.model.hf_mapping.llama import LLAMA
from megatron_rpp.model.hf_mapping.mistral import MISTRAL
from megatron_rpp.model.hf_mapping.mixtral import MIXTRAL
from megatron_rpp.model.hf_mapping.mtp import with_mtp
from megatron_rpp.model.hf_mapping.qwen2 import QWEN2
from megatron_rpp.model.hf_mapping.qwen3 import QWEN3
from megatron_rpp.model.hf_mapping.qwen3_moe import QWEN3_MOE
from megatron_rpp.model.hf_mapping.table import Family

_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, GLM, GLM4)
_EXPERTS = (MIXTRAL, QWEN3_MOE, GLM4_MOE, DEEPSEEK_V2, DEEPSEEK_V3)
FAMILIES = (*_DENSE, *_EXPERTS)
_REFUSED = {
    "Gemma3ForConditionalGeneration": "a vision model; save its language model alone, as Gemma3ForCausalLM",
}


def find_family(architecture: str) -> Family | None:
    """The family of a config.json's architecture; None where it has no table."""
    return next((family for family in FAMILIES if architecture in family.architectures), None)


def read_hf_config(path: str, setting: str = "model.path") -> HFConfig:
    """The shape of the model in directory `path`, which the user named with `setting`.

    Raises ConfigError for a directory or architecture that cannot be read, and for what this package
    would compute differently from the model's authors.
    """
    raw = RawConfig(path, setting)
    if raw.architecture in _REFUSED:
        raise raw.error(f"architecture {raw.architecture}: {_REFUSED[raw.architecture]}")
    family = find_family(raw.architecture)
    if family is None:
        raise raw.unsupported(", ".join(name for family in FAMILIES for name in family.architectures))
    return family.read(raw)


def family_of(hf: HFConfig) -> Family:
    """The family that read `hf`, with the rules of its MTP layers."""
    family = find_family(hf.architecture)
    assert family is not None, "read_hf_config knows the architecture"
    return with_mtp(family, hf)
