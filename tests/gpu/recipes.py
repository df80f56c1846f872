"""Which FP8 recipes this GPU runs, by the word of Transformer Engine: a check of ours is not tested by itself."""

from __future__ import annotations


def recipes_here() -> tuple[str, ...]:
    """Names of fp8.recipe."""
    from transformer_engine.pytorch import is_fp8_available, is_fp8_block_scaling_available, is_mxfp8_available

    found: tuple[str, ...] = ("delayed", "tensorwise") if is_fp8_available() else ()
    # On Blackwell Transformer Engine gives 128 x 128 blocks in MXFP8's clothes: not the recipe that is meant here.
    if is_fp8_block_scaling_available() and not is_mxfp8_available():
        found += ("blockwise",)
    return found + (("mxfp8",) if is_mxfp8_available() else ())


def recipe_of_parameters() -> str | None:
    """The last of this GPU's recipes whose parameters may be FP8 too (config/fp8_checks.py); None: it has none."""
    return next((recipe for recipe in reversed(recipes_here()) if recipe in ("tensorwise", "blockwise")), None)
