"""One rank of a job of two replicas with two pipeline stages: the evidence that it gathers, three times."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig, ParityConfig, TrainConfig
from megatron_rpp.engine.score import score
from megatron_rpp.experience.collate import collate
from megatron_rpp.experience.types import ExperienceBatch, Prompt, Rollout, VersionSpan
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parity import answer
from megatron_rpp.parity.awake import ask_while_awake
from megatron_rpp.parity.gather import gather_evidence
from megatron_rpp.parity.measure import Mismatch
from megatron_rpp.parity.run_parts import RunParts
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.phases import Phases
from megatron_rpp.weight_sync.transport import WeightSyncError

TEMPERATURE, ENGINE_TEMPERATURE = 0.8, 0.6  # configured, and true
SERVER_SAYS = -2.0  # of every token
RESPONSES = (3, 5)  # of each replica
CHOSEN = 4  # parity.responses
WAIT_S = 0.1  # of a phase
URLS = ("http://good:1", "http://gone:1")  # asked by replica 0, and by replica 1


class NoDifference:
    """An engine whose servers hold the trainer's weights."""

    def verify_weights(self) -> list[str]:
        return []


class Unasked:
    """An engine that cannot ask its servers."""

    def verify_weights(self) -> list[str]:
        raise WeightSyncError("nobody answers")


class Client:
    urls = URLS


class Servers:
    """One gives every token SERVER_SAYS, the other has died."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []  # (token ids, where the response begins)

    def post_json(self, url: str, endpoint: str, payload: dict[str, Any], timeout_s: float) -> dict[str, object]:
        if url == URLS[1]:
            raise RolloutError(f"{url} is gone")
        start = payload["logprob_start_len"]
        self.asked.append((payload["input_ids"], start + 1))
        first, *rest = payload["input_ids"][start:]
        return {"meta_info": {"input_token_logprobs": [[None, first, None], *([SERVER_SAYS, i, None] for i in rest)]}}


class SlowServers(Servers):
    """All live, slower than rank 0 waits for the others in the phase behind them."""

    def post_json(self, url: str, endpoint: str, payload: dict[str, Any], timeout_s: float) -> dict[str, object]:
        if not self.asked:
            time.sleep(WAIT_S + 2.5)
        return super().post_json(URLS[0], endpoint, payload, timeout_s)


class Numbers:
    """A tokenizer of texts such as "3 4 5"."""

    eos_token_ids, pad_token_id, vocab_size = (1,), 0, 19

    def encode_prompts(self, texts: Sequence[str], *, chat: bool) -> list[list[int]]:
        return self.encode_many(texts)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]


class Broken(Numbers):
    """A tokenizer with a fault."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        raise KeyError("no such merge")


def rollouts_of(replica: int) -> list[Rollout]:
    """Responses of unequal lengths; the engine of replica 1 says for one that it got another prompt."""
    g = torch.Generator().manual_seed(replica)
    rollouts = []
    for i in range(RESPONSES[replica]):
        ids = tuple(torch.randint(2, 19, (4 + i,), generator=g).tolist())
        prompt = Prompt(id=i, text="3 4 5", token_ids=(3, 4, 5), answer="")
        told = (3, 4) if replica == 1 and i == 2 else (3, 4, 5)
        text, spans = " ".join(map(str, ids)), (VersionSpan(0, 0, len(ids)),)
        rollouts.append(Rollout(prompt, i, ids, (0.0,) * len(ids), text, "length", spans, engine_prompt_ids=told))
    return rollouts


def scored(rollouts: Sequence[Rollout], policy: Model, config: Config) -> ExperienceBatch:
    """The batch as if an engine at ENGINE_TEMPERATURE had sampled it."""
    batch = collate(rollouts, [0.0] * len(rollouts), pad_token_id=0, device=policy.parallel.device)
    hot = replace(config, rollout=replace(config.rollout, temperature=ENGINE_TEMPERATURE))
    engine = score(batch, policy, None, hot).old_logprobs
    assert engine is not None
    return score(replace(batch, rollout_logprobs=engine), policy, None, config)


def main() -> None:
    model, out = sys.argv[1:3]
    config = Config(
        model=ModelConfig(path=model),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        parallel=ParallelConfig(pipeline=2, data=2),
        train=TrainConfig(micro_batch_size=2),
        parity=ParityConfig(responses=CHOSEN),
    )
    parallel = bootstrap.initialize(config.parallel, seed=0)
    policy = build_model(config, parallel, path=model)
    rollouts = rollouts_of(parallel.dp_rank)
    batch = scored(rollouts, policy, config)
    answer.post_json = (servers := Servers()).post_json
    parts: Any = partial(RunParts, config, policy)
    evidence = gather_evidence(parts(NoDifference(), Client(), Numbers()), batch, rollouts, Mismatch())
    (Path(out) / f"asked-{parallel.rank}.json").write_text(json.dumps(servers.asked))
    tokenizer = Numbers() if parallel.dp_rank == 0 else Broken()
    broken = gather_evidence(parts(Unasked(), Client(), tokenizer), batch, rollouts, Mismatch())
    mine = rollouts if parallel.dp_rank == 1 else []  # as where the other replica's groups were complete first
    answer.post_json = SlowServers().post_json
    awake_parts = parts(NoDifference(), Client(), Numbers())
    awake = ask_while_awake(awake_parts, mine)
    phases = Phases(parallel.store, WAIT_S)
    phases.run(phases.deadline("release memory"))
    slow = gather_evidence(awake_parts, batch, mine, Mismatch(), awake)
    found = [asdict(each) for each in (evidence, broken, slow)]
    (Path(out) / f"evidence-{parallel.rank}.json").write_text(json.dumps(found))
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
