"""What a Hugging Face or Megatron directory holds; headers are read, and no weights.

    python -m checkpoint_tools.inspect DIR [--tensors] [--allow-pickle]

Exit code 0, or 2 where the directory is neither, or damaged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from checkpoint_tools.command import parser, run

TOOL = "inspect"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    options = parser(TOOL, __doc__)
    options.add_argument("path", metavar="DIR", help="Hugging Face or Megatron directory")
    options.add_argument("--tensors", action="store_true", help="a line for each tensor")
    options.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, as weights alone")
    asked = options.parse_args(argv)

    def work() -> int:
        from megatron_rpp.conversion.describe import describe
        from megatron_rpp.device import dtype_name

        lines, tensors = describe(asked.path, allow_pickle=asked.allow_pickle)
        for heading, text in lines:
            sys.stdout.write(f"{heading:13} {text}\n")
        for tensor in tensors if asked.tensors else ():
            dtype = dtype_name(tensor.dtype)
            sys.stdout.write(f"{tensor.name}  {dtype}  {list(tensor.shape)}  {tensor.file}\n")
        return 0

    return run(TOOL, work)


if __name__ == "__main__":
    sys.exit(main())
