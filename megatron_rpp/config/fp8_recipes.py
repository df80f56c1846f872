"""What each FP8 recipe asks of matrices, GPUs and libraries. One table, for checks before anything is built.

The multiples are Transformer Engine's: `assert_dim_for_fp8_exec`, `is_quantizable` of its quantizers and
`get_align_size_for_quantization`. The architectures are those of `check_fp8_support`,
`check_fp8_block_scaling_support` and `check_mxfp8_support` (transformer_engine/pytorch/quantization.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_rpp.config.schema import Config

Version = tuple[int, ...]


@dataclass(frozen=True)
class RecipeRule:
    """One recipe."""

    tokens: int  # that one rank passes to a product: a multiple of it, since they are summed over for the weights
    inner: int  # a matrix's input features on one rank: a multiple of it
    outer: int  # its output features likewise
    least: Version  # compute capability
    below: Version  # compute capability, exclusive
    cuda: Version  # least version
    engine: Version  # least Transformer Engine that Megatron uses the recipe of (`fp8_utils.get_fp8_recipe`)


ENGINE_OF_RECOMPUTED_OUTPUTS: Version = (2, 6)
"""Least Transformer Engine that recomputes `fp8_checks.recomputed_from_outputs` in FP8 (Megatron's rule)."""

_ALL: Version = (99,)
RULES: dict[str, RecipeRule] = {
    "delayed": RecipeRule(16, 16, 16, (8, 9), _ALL, (12, 1), (1, 11)),
    "tensorwise": RecipeRule(16, 16, 16, (8, 9), _ALL, (12, 1), (2, 2)),
    # Sequence parallelism gathers whole blocks of 128 in FP8, and others in bfloat16. A shard that ends within a
    # block of its input features has other scales than the engine's. From Blackwell on MXFP8 stands in for it.
    "blockwise": RecipeRule(128, 128, 16, (9, 0), (12, 0), (12, 9), (2, 3)),
    "mxfp8": RecipeRule(32, 32, 32, (10, 0), (12, 0), (12, 8), (2, 1)),
}


def token_multiple(config: Config) -> int:
    """The tokens that one rank passes to a matrix product, after context and sequence parallelism have split them,
    are a multiple of it; 1 without FP8."""
    return multiple_of(config.fp8.recipe)


def multiple_of(recipe: str) -> int:
    """`token_multiple` of fp8.recipe."""
    return RULES[recipe].tokens if recipe in RULES else 1


def why_not(recipe: str, gpu: str, capability: Version, *, cuda: str = "", engine: str = "") -> str:
    """Why fp8.recipe cannot run on a GPU of that name and compute capability; empty: it can.

    cuda, engine: versions of CUDA (torch's) and Transformer Engine; empty: not looked at.
    """
    rule = RULES.get(recipe)
    if rule is None:
        return ""
    has = f"{gpu} has {_text(tuple(capability))}"
    if tuple(capability) < rule.least:
        return f"fp8.recipe={recipe} needs compute capability {_text(rule.least)}, {has}"
    if tuple(capability) >= rule.below:
        return f"fp8.recipe={recipe} needs a compute capability below {_text(rule.below)}, {has}; use tensorwise"
    for name, found, least in (("CUDA", cuda, rule.cuda), ("transformer-engine", engine, rule.engine)):
        if found and is_older(found, least):
            return f"fp8.recipe={recipe} needs {name} {_text(least)} or newer, and {found} is installed"
    return ""


def is_older(version: str, least: Version) -> bool:
    """Whether a version such as "2.5.1+cu13" is below (2, 6)."""
    return _parse(version) < least


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _parse(version: str) -> Version:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
