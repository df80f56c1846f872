"""What rollout.server_args ask of servers that a sync could not prove. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import Config

_SIZES = {  # flags of sglang.launch_server: what they are called
    **dict.fromkeys(("--ep-size", "--expert-parallel-size", "--ep"), "expert parallelism"),
    **dict.fromkeys(("--dp-size", "--data-parallel-size", "--dp"), "data parallelism"),
    **dict.fromkeys(("--attn-dp-size", "--attention-data-parallel-size"), "data parallelism"),
    **dict.fromkeys(("--pp-size", "--pipeline-parallel-size", "--pp"), "pipeline stages"),
}

_NOT_QUANTIZED = ("unquant", "none")


def check_server_args(config: Config) -> None:
    """Raises ConfigError for servers whose checksums cannot be predicted, where they are compared."""
    if config.weight_sync.verify == "off":
        return
    for flag, value in _pairs(config.rollout.server_args):
        if flag in _SIZES and value != "1":
            raise ConfigError(
                f"rollout.server_args={flag} {value}: the weights of a server with {_SIZES[flag]} cannot be verified; "
                "leave it out, with rollout.server_tensor for the server's size, or set weight_sync.verify=off"
            )
        if flag == "--quantization" and value not in _NOT_QUANTIZED and not _may_be_quantized(config):
            raise ConfigError(
                f"rollout.server_args={flag} {value}: quantized weights could not be compared with the trainer's; "
                "leave it out, set weight_sync.dtype=float8 (128 x 128 blocks), or name the quantized tensors in "
                "weight_sync.unverified"
            )


def _may_be_quantized(config: Config) -> bool:
    """Whether what servers are sent may be FP8, or tensors are left out of the comparison."""
    is_auto = config.weight_sync.dtype == "auto" and config.fp8.recipe == "blockwise"
    return is_auto or config.weight_sync.dtype == "float8" or bool(config.weight_sync.unverified)


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(flag, the word behind it or behind its `=`)."""
    for word, following in zip(words, (*words, "")[1:], strict=True):
        flag, equals, value = word.partition("=")
        yield flag, value if equals else following
