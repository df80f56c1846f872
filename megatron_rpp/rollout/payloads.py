"""Bodies of `/generate`: what is sampled, how, and by which seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from megatron_rpp.experience.types import Prompt
from megatron_rpp.rollout.protocol import SamplingParams

# SGLang fills what a request leaves out from its --preferred-sampling-params, so a server's owner could change
# the distribution behind the trainer's back. A request that says null or a neutral value is left as it is.
_NEUTRAL: dict[str, Any] = {
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "n": 1,
    "ignore_eos": False,
    "stop": None,
    "stop_regex": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "logit_bias": None,
    "custom_params": None,
}


def generate_payloads(
    prompts: Sequence[Prompt], group_ids: Sequence[int], sampling: SamplingParams, context_length: int
) -> list[dict[str, Any]]:
    """Bodies of `/generate`, one a prompt, with the prompt repeated and a seed for each sample.

    Raises ValueError for a prompt that fills `context_length`.
    """
    payloads = []
    for prompt, group_id in zip(prompts, group_ids, strict=True):
        params = _sampling_params(prompt, sampling, context_length)
        seeds = (sample_seed(sampling.seed, group_id, i) for i in range(sampling.num_samples_per_prompt))
        payloads.append(
            {
                "input_ids": [list(prompt.token_ids)] * sampling.num_samples_per_prompt,
                "sampling_params": [params | {"sampling_seed": seed} for seed in seeds],
                "return_logprob": True,
                "return_prompt_token_ids": True,  # for parity/context.py
            }
        )
    return payloads


def _sampling_params(prompt: Prompt, sampling: SamplingParams, context_length: int) -> dict[str, Any]:
    room = context_length - len(prompt.token_ids)
    if room < 1:
        raise ValueError(
            f"rollout.context_length={context_length} leaves no room for a response to prompt "
            f"{prompt.id} of {len(prompt.token_ids)} tokens; raise it or drop the prompt"
        )
    return _NEUTRAL | {
        "max_new_tokens": min(sampling.max_response_tokens, room),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop_token_ids": list(sampling.stop_token_ids),
    }


def sample_seed(seed: int, group_id: int, sample_index: int) -> int:
    """Seed of one sample, in [0, 2^63): the same on every data-parallel layout, and after a retry."""
    key = f"{seed}/{group_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
