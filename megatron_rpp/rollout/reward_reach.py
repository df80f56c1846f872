"""The services that score a run's responses: those of the user's are looked for, a reward model's is started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.config.reward_checks import spawns_reward_model
from megatron_rpp.config.schema import Config
from megatron_rpp.config.sources import reward_kinds
from megatron_rpp.parallel.collectives import gather_objects, on_rank_0
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.rollout.http import get_json
from megatron_rpp.rollout.probe import accepts_connections, at_once
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.reward_model_server import RewardModelServer, build_reward_model_server

_INFO_S = 10.0


@dataclass(frozen=True)
class RewardServices:
    """What a rank knows of them."""

    model_urls: tuple[str, ...]  # SGLang servers of the reward model; empty where no reward asks for one
    server: RewardModelServer | None  # rank 0's, where it has started one

    def wait_ready(self) -> None:
        """Until the reward model's server answers. Raises RolloutError where it could not be started."""
        if self.server is not None:
            self.server.wait_ready()


@contextmanager
def open_reward_services(config: Config, parallel: ParallelContext) -> Iterator[RewardServices]:
    """Start the reward model's server on rank 0, or see that the user's services answer. A collective of the job.

    Raises ConfigError where they do not.
    """
    on_rank_0(lambda: check_reach(config), expect=ConfigError, raises=ConfigError)
    server = None
    if parallel.rank == 0 and spawns_reward_model(config):
        server = build_reward_model_server(config)
        server.start()
    try:
        spawned = gather_objects(server.url if server else "")[0]
        yield RewardServices((spawned,) if spawned else config.reward.model_urls, server)
    finally:
        if server is not None:
            server.stop()


def check_reach(config: Config) -> None:
    """The services that run already can be reached, and those of a reward model score. Raises ConfigError."""
    kinds, reward = reward_kinds(config), config.reward
    if "remote" in kinds and not accepts_connections(reward.url):
        raise ConfigError(f"reward.url={reward.url}: nobody listens at {_place(reward.url)}; start the service first")
    if "model" in kinds and reward.model_urls:
        _check_models(reward)


def _check_models(reward: RewardConfig) -> None:
    for url, trouble in zip(reward.model_urls, at_once(_why_not, reward.model_urls), strict=True):
        if trouble is not None:
            raise ConfigError(f"reward.model_urls={url}: {trouble}")


def _why_not(url: str) -> str | None:
    """Why the SGLang server at `url` cannot score; None where it can."""
    if not accepts_connections(url):
        return f"nobody listens at {_place(url)}; start sglang.launch_server --is-embedding there first"
    try:
        generates = get_json(url, "model_info", _INFO_S).get("is_generation")
    except RolloutError as error:
        return str(error)
    if generates is not False:
        return "this server does not serve a reward model; start it with --is-embedding and the model's directory"
    return None


def _place(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
