"""The one Hugging Face <-> Megatron name and shape table, a file a family."""

from megatron_rpp.model.hf_mapping.llama import LLAMA
from megatron_rpp.model.hf_mapping.qwen2 import QWEN2
from megatron_rpp.model.hf_mapping.qwen3 import QWEN3
from megatron_rpp.model.hf_mapping.table import Family

FAMILIES = (LLAMA, QWEN2, QWEN3)


def find_family(architecture: str) -> Family:
    """The family of a config.json's architecture. ValueError for one that has no table."""
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ValueError(f"architecture {architecture} is not supported; supported: {known}")
