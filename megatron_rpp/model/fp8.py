"""FP8 in Megatron's TransformerConfig.

Policy and reference have the same settings, so that equal weights give equal log-probs: with every recipe but
`delayed` the scales of a pass come from that pass alone. Those of `delayed` come from earlier passes, each model's
own: `engine/fp8_scales.py` gives both models some before the first scoring. Later they may differ by rounding, and
the scales that a batch is trained with differ from those that it was scored with: `ratio/mean` is then 1 up to FP8's
noise. Weights are quantized anew in the first microbatch of each `run_pipeline` (Megatron's `set_is_first_microbatch`).
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rpp.config.fp8_checks import recomputed_from_outputs
from megatron_rpp.config.fp8_recipes import ENGINE_OF_RECOMPUTED_OUTPUTS, is_older, multiple_of, why_not
from megatron_rpp.config.performance import Fp8Config
from megatron_rpp.config.schema import Config
from megatron_rpp.device.gpus import gpus, package_version, software


def fp8_settings(fp8: Fp8Config, layer_spec: str) -> dict[str, Any]:
    """TransformerConfig's fields; none without FP8, and none for local layers, which are built for their shapes.

    Experts are padded to the recipe's multiple in `TEGroupedMLP` itself: moe_router_padding_for_quantization would
    send them tokens that the router did not choose.
    """
    if not fp8.is_on or layer_spec != "te":
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.params,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(fp8.bf16_first_layers or fp8.bf16_last_layers),
        "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
        "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
    }


def token_multiple_of(transformer: TransformerConfig) -> int:
    """`token_multiple` of the model that was built so."""
    return multiple_of(transformer.fp8_recipe or "") if transformer.fp8 else 1


def shares_scales(transformer: TransformerConfig) -> bool:
    """Whether every pass ends with a collective over the replicas' ranks: the maxima of recipe `delayed`."""
    return bool(transformer.fp8) and transformer.fp8_recipe == "delayed"


def check_can_compute(config: Config, layer_spec: str) -> None:
    """This process has what config.fp8 needs. layer_spec: as `resolve_layer_spec` answers. Raises ValueError."""
    if not config.fp8.is_on:
        return
    if layer_spec != "te":
        raise ValueError(
            f"fp8.recipe={config.fp8.recipe} needs Transformer Engine and a GPU, and model.layer_spec="
            f"{config.model.layer_spec} is local here; install transformer-engine, or set fp8.recipe=none"
        )
    cuda, engine = software().get("CUDA", ""), package_version("transformer-engine")
    for gpu in gpus():
        if reason := why_not(config.fp8.recipe, gpu.name, gpu.capability, cuda=cuda, engine=engine):
            raise ValueError(reason)
    again = recomputed_from_outputs(config)
    if again is not None and engine and is_older(engine, ENGINE_OF_RECOMPUTED_OUTPUTS):
        raise ValueError(
            f"memory.recompute_modules={again} with fp8.recipe={config.fp8.recipe} needs transformer-engine 2.6 or "
            f"newer, and {engine} is installed; leave {again} out"
        )
