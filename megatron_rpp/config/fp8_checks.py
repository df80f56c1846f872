"""Settings that FP8 needs and those that it excludes, as far as the configuration tells."""

from __future__ import annotations

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import Config


def check_fp8(config: Config) -> None:
    """Raises ConfigError. Shapes are `model.fp8_shapes`', GPUs and packages are `model.build`'s and the doctor's."""
    fp8, model = config.fp8, config.model
    if not fp8.is_on:
        return
    chosen = f"fp8.recipe={fp8.recipe}"
    if model.dtype != "bfloat16":
        raise ConfigError(f"{chosen} must go with model.dtype=bfloat16, not {model.dtype}")
    if model.layer_spec == "local":
        raise ConfigError(f"{chosen} must go with model.layer_spec=te or auto: local layers have no FP8")
    if fp8.params and not config.optimizer.distributed:
        raise ConfigError(
            "fp8.params=true must go with optimizer.distributed=true, which holds the float32 main weights"
        )
    if fp8.params and fp8.recipe == "mxfp8":
        # Megatron then keeps them apart from its buffers and gathers bfloat16 ones in those of the gradients.
        raise ConfigError("fp8.params=true cannot go with fp8.recipe=mxfp8; set fp8.params=false")
    if fp8.recipe == "delayed":
        _check_delayed(config)
        _check_delayed_speed(config)


def _check_delayed(config: Config) -> None:
    """Scales from earlier passes: what would need them before there is one, or layer by layer, is excluded."""
    fp8 = config.fp8
    for key in ("bf16_first_layers", "bf16_last_layers"):
        if getattr(fp8, key):
            raise ConfigError(
                f"fp8.{key}={getattr(fp8, key)} cannot go with fp8.recipe=delayed, whose scales are updated for all "
                "layers at once; use tensorwise, or set it to 0"
            )
    if fp8.params:
        # A Float8Tensor keeps the scale that it was made with, which is 1 before the first pass.
        raise ConfigError(
            "fp8.params=true cannot go with fp8.recipe=delayed: weights would be loaded before they have a scale; "
            "use tensorwise, or fp8.params=false"
        )


def _check_delayed_speed(config: Config) -> None:
    """Two more that would need a pass's scales twice, or update them out of turn."""
    if config.train.cuda_graphs:
        # Megatron would update the gradients' scales behind each graphed layer's backward, and roll with them the
        # histories of the layers that have not run yet.
        raise ConfigError(
            "fp8.recipe=delayed cannot go with train.cuda_graphs=true: each layer's graph would move the history of "
            "all layers; use tensorwise"
        )
    if (again := recomputed_from_outputs(config)) is not None:
        raise ConfigError(
            f"memory.recompute_modules={again} cannot go with fp8.recipe=delayed, by Megatron's rules; use tensorwise, "
            "or leave it out"
        )


def recomputed_from_outputs(config: Config) -> str | None:
    """The first of memory.recompute_modules that gives its output away and makes it anew, which FP8 limits."""
    memory = config.memory
    modules = memory.recompute_modules if memory.recompute == "selective" else ()
    return next((module for module in modules if module in ("layernorm", "moe_act")), None)
