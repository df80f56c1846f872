"""Weights to SGLang through a Hugging Face directory that trainer and servers both see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rpp.model.build import Model
from megatron_rpp.model.save_hf import save_hf
from megatron_rpp.parallel.collectives import on_rank_0
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.transport import Post, WeightSyncError


class DiskTransport:
    """Writes `folder` anew at each sync and has every server load it."""

    def __init__(self, post: Post, *, folder: Path, source: str, deadline_s: float, mtp: str = "keep") -> None:
        """mtp: `keep` or `drop` the multi-token prediction layers of the directory `source`, beside the policy."""
        self._post, self._folder, self._source, self._deadline_s = post, folder.resolve(), source, deadline_s
        self._mtp = mtp

    def send(self, policy: Model, urls: Sequence[str]) -> None:
        """Write, then load. Raises WeightSyncError on every rank if writing failed or a server refused."""
        try:
            save_hf(policy, self._source, str(self._folder), mtp=self._mtp)
        except OSError as failed:
            raise WeightSyncError(str(failed)) from failed
        on_rank_0(lambda: self._load(urls), expect=RolloutError, raises=WeightSyncError)

    def _load(self, urls: Sequence[str]) -> None:
        payload: dict[str, object] = {"model_path": str(self._folder), "flush_cache": False}
        for url in urls:
            self._post(url, "update_weights_from_disk", payload, self._deadline_s)

    def close(self) -> None:
        """Nothing is held between syncs."""
