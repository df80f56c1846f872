"""What FP8 takes beside, or saves of, weights in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpp.config.schema import Config

# float32 for each 128 x 128, and a byte for each 32; both ways round, as the data. Other recipes have one a matrix.
_SCALES = {"blockwise": 2 * 4 / 128**2, "mxfp8": 2 / 32}


@dataclass(frozen=True)
class Fp8Weights:
    """Bytes of one model on a rank."""

    copies: int = 0  # that Transformer Engine keeps of its matrices, with their scales
    narrower: int = 0  # by which they are smaller than in bfloat16


def fp8_weights(config: Config, elements: int) -> Fp8Weights:
    """elements: of the rank's matrices that are computed in FP8.

    Products want each matrix as it is and transposed, which on Hopper are two copies (per-tensor recipes on
    Blackwell need one). With fp8.params the first of them is the parameter itself.
    """
    if not config.fp8.is_on:
        return Fp8Weights()
    scales = round(elements * _SCALES.get(config.fp8.recipe, 0.0))
    if config.fp8.params:
        return Fp8Weights(copies=elements + scales, narrower=elements)
    return Fp8Weights(copies=2 * elements + scales)
