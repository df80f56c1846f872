"""What rollout.server_args ask of servers that a sync could not prove. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import Config

_SIZES = {  # flags of sglang.launch_server: what they are called
    **dict.fromkeys(("--ep-size", "--expert-parallel-size", "--ep"), "expert parallelism"),
    **dict.fromkeys(("--dp-size", "--data-parallel-size", "--dp"), "data parallelism"),
    **dict.fromkeys(("--pp-size", "--pipeline-parallel-size", "--pp"), "pipeline stages"),
}


def check_server_args(config: Config) -> None:
    """Raises ConfigError for a layout of servers whose checksums cannot be predicted, where they are compared."""
    if config.weight_sync.verify == "off":
        return
    for flag, value in _pairs(config.rollout.server_args):
        if flag in _SIZES and value != "1":
            raise ConfigError(
                f"rollout.server_args={flag} {value}: the weights of a server with {_SIZES[flag]} cannot be verified; "
                "leave it out, with rollout.server_tensor for the server's size, or set weight_sync.verify=off"
            )


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(flag, the word behind it or behind its `=`)."""
    for word, following in zip(words, (*words, "")[1:], strict=True):
        flag, equals, value = word.partition("=")
        yield flag, value if equals else following
