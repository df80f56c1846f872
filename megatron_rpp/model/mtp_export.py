"""The multi-token prediction layers of an exported directory: those of the directory that the run started from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor

from megatron_rpp.model.hf_io.tensors import HFTensors
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.hf_mapping.mtp import CONFIG_KEY, is_mtp, mtp_copies, stored_mtp
from megatron_rpp.model.load_megatron import is_megatron_directory


def open_mtp(source: str, mtp: str) -> HFTensors | None:
    """The files that hold the MTP layers of the directory `source`; None where none are wanted or there.

    mtp: `drop` leaves them out. A Megatron directory gives none. Raises OSError or ValueError where the
    directory can no longer be read.
    """
    if mtp == "drop" or is_megatron_directory(source):
        return None
    return HFTensors(source, allow_pickle=True)  # if there are pickles alone, the run was allowed to start from them


def with_mtp_layers(
    source: str,
    files: HFTensors | None,
    tensors: Iterator[tuple[str, Tensor]],
    is_last_stage: bool,
    read: Callable[[HFTensors, str], Tensor] = HFTensors.read,
) -> Iterator[tuple[str, Tensor]]:
    """A pipeline stage's `tensors` by HF name, and on the last stage the MTP layers of the directory `source`.

    files: of `open_mtp`. Copies of the embedding and the output weights follow what they repeat. `read`
    gives a tensor of the source.
    """
    if files is None:
        yield from tensors
        return
    hf = stored_mtp(read_hf_config(source), files.names)
    copies = mtp_copies(hf)
    for name, tensor in tensors:
        yield name, tensor
        yield from ((copy, tensor) for copy, main in copies.items() if main == name)
    if is_last_stage:
        yield from ((name, read(files, name)) for name in files.names if is_mtp(name, hf) and name not in copies)


def mtp_changes(source: str, names: Collection[str]) -> dict[str, Any]:
    """What the config.json of `source` must say otherwise beside the HF tensors `names`: how many MTP layers."""
    return told_mtp(source, stored_mtp(read_hf_config(source), names).num_mtp_layers)


def told_mtp(source: str, held: int) -> dict[str, Any]:
    """What the config.json of `source` must say otherwise beside `held` MTP layers."""
    return {} if held == read_hf_config(source).num_mtp_layers else {CONFIG_KEY: held}
