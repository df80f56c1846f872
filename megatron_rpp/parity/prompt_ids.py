"""The ids that the engine sampled behind, and the texts' ids, against those trained on."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.experience.types import Rollout
from megatron_rpp.parity.evidence import PromptIdsCheck


def check_prompt_ids(
    rollouts: Sequence[Rollout], picked: Sequence[Rollout], tokenizer: Tokenizer, *, chat: bool
) -> PromptIdsCheck:
    """Prompt ids of all `rollouts`; the texts are tokenized again only of `picked`.

    `chat`: prompts are a user's turn in the chat template (data.chat_template).
    """
    told = [r for r in rollouts if r.engine_prompt_ids is not None]
    wrong = [r for r in told if r.engine_prompt_ids != r.prompt.token_ids]
    prompts = tokenizer.encode_prompts([r.prompt.asked for r in picked], chat=chat)
    responses = tokenizer.encode_many([r.text for r in picked])
    return PromptIdsCheck(
        known=len(told),
        unknown=len(rollouts) - len(told),
        different=len(wrong),
        example=_example(wrong[0]) if wrong else "",
        retokenized=len(picked),
        retokenized_otherwise=sum(tuple(ids) != r.prompt.token_ids for ids, r in zip(prompts, picked, strict=True)),
        responses_otherwise=sum(tuple(ids) != _without_stop(r) for ids, r in zip(responses, picked, strict=True)),
    )


def _without_stop(rollout: Rollout) -> tuple[int, ...]:
    return rollout.response_ids if rollout.is_truncated else rollout.response_ids[:-1]


def _example(rollout: Rollout) -> str:
    ours, theirs = rollout.prompt.token_ids, rollout.engine_prompt_ids or ()
    pairs = zip(ours, theirs, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return (
        f"prompt {rollout.prompt.id} has {len(ours)} tokens here and {len(theirs)} there, and from token {at} on "
        f"{_few(ours, at)} here and {_few(theirs, at)} there"
    )


def _few(ids: Sequence[int], start: int) -> str:
    shown = " ".join(str(i) for i in ids[start : start + 5])
    return (shown + (" .." if len(ids) > start + 5 else "")) or "nothing"
