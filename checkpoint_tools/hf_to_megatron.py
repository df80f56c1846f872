"""Convert a Hugging Face directory to a Megatron distributed checkpoint.

    python -m checkpoint_tools.hf_to_megatron --hf MODEL_DIR --out OUT_DIR [--tp N] [--pp N] [--ep N]
        [--dtype float32|bfloat16] [--mtp keep|drop] [--allow-pickle]

One process, no GPU, one parameter in memory at a time. OUT_DIR loads at any layout (model.path may name
it, and Megatron's dist_checkpointing.load reads it), and holds config and tokenizer, so it stands alone.
The layout options only decide how the weights are cut: with --tp N each matrix is stored in N parts, so
that a rank of that layout reads its own bytes and no others. Layers and experts are always stored apart,
experts uncut;
--pp and --ep are checked against the model and change nothing else.

OUT_DIR appears when it is whole. After a kill, the same command continues OUT_DIR.partial; after an error
nothing is left. Exit code 0: done; 2: an error that the user can mend, told in one line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from checkpoint_tools.command import parser, positive, run

TOOL = "hf_to_megatron"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    options = parser(TOOL, __doc__)
    options.add_argument("--hf", metavar="MODEL_DIR", required=True, help="Hugging Face directory")
    options.add_argument("--out", metavar="OUT_DIR", required=True, help="made anew; never overwritten")
    options.add_argument("--tp", type=positive, default=1, help="store each matrix in this many parts (default 1)")
    options.add_argument("--pp", type=positive, default=1, help="must divide the layers; cuts nothing")
    options.add_argument("--ep", type=positive, default=1, help="must divide the experts; cuts nothing")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="cast to this (default: as stored)")
    options.add_argument("--mtp", choices=("keep", "drop"), default="keep", help="multi-token prediction layers")
    options.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, as weights alone")
    asked = options.parse_args(argv)

    def work() -> int:
        from megatron_rpp.conversion.to_megatron import ToMegatron, convert_to_megatron

        layout = {"tensor": asked.tp, "pipeline": asked.pp, "expert": asked.ep}
        how = {"dtype": asked.dtype, "mtp": asked.mtp, "allow_pickle": asked.allow_pickle}
        convert_to_megatron(ToMegatron(asked.hf, asked.out, **layout, **how))
        return 0

    return run(TOOL, work)


if __name__ == "__main__":
    sys.exit(main())
