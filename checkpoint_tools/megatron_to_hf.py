"""Convert a Megatron distributed checkpoint to a Hugging Face directory.

    python -m checkpoint_tools.megatron_to_hf --megatron CHECKPOINT_DIR --out OUT_DIR [--hf MODEL_DIR]
        [--dtype float32|bfloat16] [--fp8] [--mtp keep|drop] [--shard-gb 4]

CHECKPOINT_DIR is what hf_to_megatron wrote, or a step of a run (runs/NAME/checkpoints/step-N); its
optimizer is not read. --hf names config and tokenizer of a checkpoint that has none. One process, no
GPU, one parameter in memory at a time. transformers loads OUT_DIR as it stands.

OUT_DIR appears when it is whole. After a kill, the same command continues OUT_DIR.partial; after an error
nothing is left. Exit code 0: done; 2: an error that the user can mend, told in one line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from checkpoint_tools.command import not_negative, parser, run

TOOL = "megatron_to_hf"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    options = parser(TOOL, __doc__)
    options.add_argument("--megatron", metavar="CHECKPOINT_DIR", required=True, help="Megatron directory")
    options.add_argument("--out", metavar="OUT_DIR", required=True, help="made anew; never overwritten")
    options.add_argument("--hf", metavar="MODEL_DIR", help="config and tokenizer, where CHECKPOINT_DIR has none")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="cast to this (default: as stored)")
    options.add_argument("--fp8", action="store_true", help="projections as FP8 in 128 x 128 blocks")
    options.add_argument("--mtp", choices=("keep", "drop"), default="keep", help="multi-token prediction layers")
    options.add_argument("--shard-gb", type=not_negative, default=4.0, help="largest safetensors file, in 10^9 bytes")
    asked = options.parse_args(argv)
    if asked.shard_gb <= 0:
        options.error("--shard-gb must be above 0")

    def work() -> int:
        from megatron_rpp.conversion.to_hf import ToHF, convert_to_hf

        file_bytes = max(1, int(asked.shard_gb * 1e9))
        convert_to_hf(ToHF(asked.megatron, asked.out, asked.hf, asked.dtype, asked.fp8, asked.mtp, file_bytes))
        return 0

    return run(TOOL, work)


if __name__ == "__main__":
    sys.exit(main())
