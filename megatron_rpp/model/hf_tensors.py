"""The safetensors of a Hugging Face directory, checked as they are opened and read."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_COMPUTED = "rotary_emb.inv_freq"  # a buffer that old Llama checkpoints hold
_SHOWN = 3  # names that an error lists


class HFTensors:
    """Tensors by name, memory-mapped; only safetensors are read, and only inside the directory."""

    def __init__(self, path: str) -> None:
        """ValueError where there is no model, or an index names a file that is missing or elsewhere."""
        self.path = Path(path)
        if (self.path / _INDEX).exists():
            self._file_of = self._read_index()
        elif (self.path / _WHOLE).exists():
            self._file_of = dict.fromkeys(self._names_in(_WHOLE), _WHOLE)
        else:
            raise ValueError(f"{path} holds no {_WHOLE}; save the model with safetensors first")

    def read(self, name: str) -> Tensor:
        """The whole tensor. ValueError where the directory lacks it or its file is damaged."""
        if name not in self._file_of:
            raise ValueError(f"{self.path} lacks the tensor {name}, which its config.json implies")
        file = self.path / self._file_of[name]
        try:
            with safe_open(str(file), "pt") as f:
                return f.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: cannot read the tensor {name}: {error}; download or save it again") from error

    def require_no_others(self, names: Collection[str]) -> None:
        """ValueError where the directory holds a tensor that is not among `names`."""
        others = sorted(n for n in self._file_of.keys() - set(names) if not n.endswith(_COMPUTED))
        if others:
            shown = ", ".join(others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
            raise ValueError(
                f"{self.path} holds {len(others)} tensors that its config.json does not imply ({shown}); check "
                "num_hidden_layers, and merge adapters first"
            )

    def _read_index(self) -> dict[str, str]:
        try:
            files: dict[str, str] = dict(json.loads((self.path / _INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path / _INDEX} is not an index of safetensors: {error!r}") from error
        for file in set(files.values()):
            if Path(file).name != file:
                raise ValueError(f"{self.path / _INDEX} names {file}; only files in the same directory are read")
            if not (self.path / file).is_file():
                raise ValueError(f"{self.path / file} is missing; {_INDEX} names it")
        return files

    def _names_in(self, file: str) -> list[str]:
        try:
            with safe_open(str(self.path / file), "pt") as f:
                return list(f.keys())
        except SafetensorError as error:
            raise ValueError(f"{self.path / file} is damaged: {error}; download or save it again") from error
