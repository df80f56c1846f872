"""The reward that a configuration asks for: each prompt's source has its kind, and all of them the same format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_rpp.config.data import SourceConfig
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.reward.format import FormatReward
from megatron_rpp.reward.function import FunctionReward
from megatron_rpp.reward.math.math_answer import MathAnswerReward
from megatron_rpp.reward.protocol import Reward
from megatron_rpp.reward.reasoning_gym import ReasoningGymReward
from megatron_rpp.reward.services.remote import RemoteReward
from megatron_rpp.reward.services.reward_model import RewardModel

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout


class RewardBySource:
    """Each response's reward, by the kind of its prompt's source, and the format reward on top."""

    def __init__(self, kinds: Mapping[str, str], rewards: Mapping[str, Reward], format_reward: FormatReward) -> None:
        """kinds: by Prompt.source. rewards: by kind."""
        self._kinds, self._rewards, self._format = kinds, rewards, format_reward

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        scores = self._format(rollouts)
        for kind, reward in self._rewards.items():
            rows = [row for row, rollout in enumerate(rollouts) if self._kinds[rollout.prompt.source] == kind]
            for row, score in zip(rows, reward([rollouts[row] for row in rows]) if rows else [], strict=True):
                scores[row] += score
        return scores

    @property
    def function(self) -> FunctionReward | None:
        """The user's own, where a source has it."""
        found = self._rewards.get("function")
        assert found is None or isinstance(found, FunctionReward)
        return found

    def start(self) -> None:
        """Says now what only a start tells: raises ConfigError where the user's function cannot be imported."""
        if self.function is not None:
            self.function.start()

    def metrics(self) -> Metrics:
        """Those of all kinds and of the format."""
        found = self._format.metrics()
        for reward in self._rewards.values():
            found.merge(reward.metrics())
        return found

    def close(self) -> None:
        for reward in (self._format, *self._rewards.values()):
            reward.close()


def build_reward(
    config: RewardConfig,
    sources: Mapping[str, SourceConfig],
    model_urls: Sequence[str] = (),
    beside: RewardBySource | None = None,
) -> RewardBySource:
    """The reward for prompts of `sources`, by Prompt.source. A kind is built once, however many ask for it.

    Args:
        config: the section `reward`.
        sources: training_sources or held_out_sources (config/sources.py).
        model_urls: of servers of the reward model, where a source asks for kind model.
        beside: the reward of other prompts, in whose processes the user's function runs, too.

    Raises:
        ValueError: a reward model without its tokenizer.
    """
    kinds = {name: source.reward or config.kind for name, source in sources.items()}
    rewards = {}
    for kind in sorted(set(kinds.values())):
        assert kind in _MAKERS, kind  # config/ranges.py and config/sources.py have looked
        own = {name: source for name, source in sources.items() if kinds[name] == kind}
        rewards[kind] = _MAKERS[kind](config, own, model_urls, beside)
    return RewardBySource(kinds, rewards, FormatReward(config))


_Maker = Callable[[RewardConfig, Mapping[str, SourceConfig], Sequence[str], RewardBySource | None], Reward]
_MAKERS: dict[str, _Maker] = {
    "math_answer": lambda config, sources, urls, beside: MathAnswerReward(config),
    "reasoning_gym": lambda config, sources, urls, beside: ReasoningGymReward(config, sources),
    "function": lambda config, sources, urls, beside: FunctionReward(config, beside.function if beside else None),
    "remote": lambda config, sources, urls, beside: RemoteReward(config),
    "model": lambda config, sources, urls, beside: RewardModel(config, urls),
}
