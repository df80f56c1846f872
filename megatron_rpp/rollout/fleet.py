"""The SGLang servers of a run: attached by URL, or one spawned beside the trainer."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from megatron_rpp import device
from megatron_rpp.config.schema import Config
from megatron_rpp.parallel.collectives import gather_objects
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.rollout.sglang_server import SGLangServer

logger = logging.getLogger(__name__)


class ServerFleet:
    """Known to every rank by its URLs; rank 0 owns the spawned server. Collective methods say so."""

    def __init__(self, config: Config, client: SGLangClient) -> None:
        self._config, self._client = config, client
        self._server: SGLangServer | None = None
        if not config.rollout.urls and dist.get_rank() == 0:
            self._server = SGLangServer(
                model_path=config.model.path,
                rollout=config.rollout,
                dtype=config.model.dtype,
                log_path=Path(config.run.dir) / "logs" / "sglang.txt",
                device=device.current().type,
                trust_remote_code=config.model.trust_remote_code,
            )
            self._server.start()  # it loads while the trainer builds its models

    def wait_ready(self) -> tuple[str, ...]:
        """Wait until every server answers; their URLs. A collective over the whole job."""
        error, urls = gather_objects(self._wait() if dist.get_rank() == 0 else (None, ()))[0]
        if error is not None:
            raise RolloutError(error)
        self._client.urls = urls
        return urls

    def revive(self) -> tuple[str, ...]:
        """Restart the spawned server if it has died or does not answer; the URLs. A collective over the whole job."""
        server = self._server
        if server is not None and not (server.is_alive() and self._client.health(server.url)):
            logger.warning("the SGLang server at %s is gone; restarting it", server.url)
            server.stop()
            server.start()
        return self.wait_ready()

    def stop(self) -> None:
        """Stop what was spawned; attached servers run on."""
        if self._server is not None:
            self._server.stop()

    def _wait(self) -> tuple[str | None, tuple[str, ...]]:
        """(what went wrong, the URLs), on rank 0."""
        if self._server is None:
            for url in self._config.rollout.urls:
                if not self._client.health(url):
                    return f"rollout.urls: no healthy SGLang server answers at {url}", ()
            return None, self._config.rollout.urls
        try:
            self._server.wait_ready(self._config.rollout.startup_deadline_s)
        except RolloutError as error:
            return str(error), ()
        return None, (self._server.url,)
