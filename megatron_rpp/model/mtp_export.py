"""The multi-token prediction layers of an exported directory: those of the directory that the run started from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.hf_mapping.mtp import CONFIG_KEY, is_mtp, mtp_copies, stored_mtp
from megatron_rpp.model.hf_tensors import HFTensors
from megatron_rpp.model.load_megatron import is_megatron_directory


def mtp_tensors(source: str, main: Mapping[str, Tensor], *, is_last_stage: bool) -> dict[str, Tensor]:
    """What a pipeline stage adds to its tensors `main`: by HF name, as the Hugging Face directory `source` has it.

    Copies of the embedding and the output weights are those of `main`. A Megatron directory gives none.
    Raises ValueError where `source` can no longer be read.
    """
    hf = read_hf_config(source)
    if not hf.num_mtp_layers or is_megatron_directory(source):
        return {}
    files = HFTensors(source, allow_pickle=True)  # if there are pickles alone, the run was allowed to start from them
    hf = stored_mtp(hf, files.names)
    copies = mtp_copies(hf)
    found = {copy: main[name].clone() for copy, name in copies.items() if name in main}
    if is_last_stage:
        found |= {name: files.read(name) for name in files.names if is_mtp(name, hf) and name not in copies}
    return found


def count_mtp(source: str, names: Collection[str]) -> int:
    """How many of the MTP layers that the config.json of `source` claims are among the HF tensors `names`."""
    return stored_mtp(read_hf_config(source), names).num_mtp_layers


def tell_mtp(config: dict[str, Any], source: str, held: int) -> None:
    """Change the config.json that was read from `source` where it claims other than the `held` MTP layers."""
    if read_hf_config(source).num_mtp_layers != held:
        config[CONFIG_KEY] = held
