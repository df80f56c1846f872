"""From evidence to the cause. Pure: the same evidence gives the same words on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_rpp.parity.evidence import Evidence, wrong_servers
from megatron_rpp.parity.policy import is_sampled_otherwise

Kind = Literal["weights", "tokenization", "sampling", "numerics", "unknown"]

_LINES = 5  # of servers with other weights that are shown
_LARGE = 0.5  # nats: from here on two distributions have so little in common that distance adds nothing
_GROWS = 0.2  # correlation with the position from which on the difference is said to grow


@dataclass(frozen=True)
class Diagnosis:
    """The cause, and what a user should know and change."""

    kind: Kind
    words: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.words}"


def diagnose(e: Evidence) -> Diagnosis:
    """The most certain cause of what `e` shows: what was proved stands before what was inferred.

    A temperature may fit log-probs that are wrong for another reason (a lost logit scale or soft cap); servers that
    have only another temperature agree with the trainer at temperature 1, so they are heard first.
    """
    proved = _weights(e) or _prompt_ids(e) or _sampled_otherwise(e) or _servers_disagree(e)
    found = proved or _temperature(e) or _only_sampling_disagrees(e)
    return Diagnosis(found.kind, " ".join([found.words, *(f"({note})" for note in e.notes)]))


def _weights(e: Evidence) -> Diagnosis | None:
    if not e.stale:
        return None
    shown, more = "; ".join(e.stale[:_LINES]), len(e.stale) - _LINES
    rest = f"; and {more} more" if more > 0 else ""
    return Diagnosis(
        "weights",
        f"the weights of {_servers(len(e.stale))} are not the trainer's: {shown}{rest}. Set weight_sync.verify=full, "
        "and see that nothing else updates these servers.",
    )


def _prompt_ids(e: Evidence) -> Diagnosis | None:
    check = e.prompt_ids
    if not check.different:
        return None
    return Diagnosis(
        "tokenization",
        f"the engine sampled {check.different} of {check.known} responses from other prompt ids than those trained "
        f"on: {check.example}.{_retokenized(e)} Look at data.chat_template, data.prompt_template and at what stands "
        "between trainer and server.",
    )


def _temperature(e: Evidence) -> Diagnosis | None:
    fit = e.fit
    if not fit.explains:
        return None
    hint = (
        " If it is 1, the server may run with SGLANG_RETURN_ORIGINAL_LOGPROB, which it must not."
        if abs(math.log(fit.best)) < 0.05
        else ""
    )
    return Diagnosis(
        "sampling",
        f"the engine's log-probs are those of temperature {fit.best:.3g}, not of rollout.temperature="
        f"{fit.configured:g}: with the trainer at {fit.best:.3g} the difference falls from {fit.error:.3g} to "
        f"{fit.best_error:.3g}. Look at the server's own sampling defaults and at rollout.server_args.{hint}",
    )


def _sampled_otherwise(e: Evidence) -> Diagnosis | None:
    """The engine reports the trainer's log-probs, and draws other tokens than they say."""
    if e.fit.explains or not is_sampled_otherwise(e.mismatch, e.top_p):
        return None
    return Diagnosis(
        "sampling",
        "the engine reports the trainer's log-probs and does not sample by them: the mean of -log-prob differs from "
        f"the entropy by {e.mismatch.bias():.3g} nats a token. A top_p below 1, top_k, min_p, a penalty or greedy "
        "sampling on the server does that: look at its --preferred-sampling-params and at "
        "SGLANG_RETURN_ORIGINAL_LOGPROB in its environment.",
    )


def _servers_disagree(e: Evidence) -> Diagnosis | None:
    """Given the same tokens, some server computes other log-probs than the trainer."""
    wrong = wrong_servers(e.servers, e.fit.configured)
    if not wrong:
        return None
    which = ", ".join(f"{url} (by {mean:.3g} nats a token)" for url, mean in wrong.items())
    if e.stale is None:
        return Diagnosis(
            "unknown",
            f"of equal tokens {len(wrong)} of {len(e.servers)} servers compute other log-probs: {which}.{_growth(e)} "
            "Other weights or other numerics: the weights were not compared.",
        )
    return Diagnosis(
        "numerics",
        f"of equal tokens with equal weights {len(wrong)} of {len(e.servers)} servers compute other log-probs: "
        f"{which}.{_growth(e)} Compare config.json, dtypes and attention of server and trainer, and "
        "rollout.server_args.",
    )


def _only_sampling_disagrees(e: Evidence) -> Diagnosis:
    """The servers agree with the trainer on these tokens now, and did not while they sampled."""
    if not e.servers:
        return Diagnosis(
            "unknown",
            f"prompt ids and temperature explain nothing, and no server scored the tokens again.{_growth(e)}",
        )
    if e.prompt_ids.unknown and not e.prompt_ids.known:
        return Diagnosis(
            "tokenization",
            "the servers give these tokens the trainer's log-probs now and gave them others when they sampled: most "
            f"likely they sampled behind another prompt; what they got they do not say.{_retokenized(e)} Look at "
            "data.chat_template and at what stands between trainer and server.",
        )
    return Diagnosis(
        "numerics",
        "the servers compute the trainer's log-probs when they read these tokens, and others when they sample them: "
        f"look at decoding kernels, the dtype of the KV cache, and a cache of older weights.{_growth(e)}",
    )


def _servers(count: int) -> str:
    return "1 server" if count == 1 else f"{count} servers"


def _growth(e: Evidence) -> str:
    correlation, slope = e.mismatch.growth()
    if not correlation > _GROWS:
        flat = f" The difference does not grow with the position (correlation {correlation:.2f})."
        if e.mismatch.mean > _LARGE:
            flat += f" That clears no rope setting: above {_LARGE:g} nats hardly any difference can grow further."
        return flat
    return (
        f" The difference grows with the position, by {slope:.2g} in 100 tokens (correlation {correlation:.2f}): "
        "suspect rope settings and position ids first."
    )


def _retokenized(e: Evidence) -> str:
    """Whether the trainer's own ids are those of the texts."""
    check = e.prompt_ids
    if not check.retokenized:
        return ""
    words = " The trainer's ids are those of the prompts' text."
    if check.retokenized_otherwise:
        words = (
            f" The trainer's ids are not those of the prompt's text for {check.retokenized_otherwise} of "
            f"{check.retokenized} prompts."
        )
    if check.responses_otherwise:
        words += (
            f" The text of {check.responses_otherwise} of {check.retokenized} responses tokenizes to other ids, "
            "as sampled text often does."
        )
    return words
