"""Planted faults between a real trainer and real servers: the parity monitor names each, and no other."""

from __future__ import annotations

import base64
import json
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, ModelConfig, ParityConfig, TrainConfig
from megatron_rpp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rpp.engine.score import score
from megatron_rpp.experience.collate import collate
from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.model.export_hf import hf_tensors
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parity.monitor import Parity, ParityMonitor
from megatron_rpp.parity.policy import ParityError
from megatron_rpp.parity.run_parts import RunParts
from megatron_rpp.rollout import control, sglang_client
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.payloads import generate_payloads
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.rollout.sglang_server import SGLangServer
from megatron_rpp.weight_sync.build import build_engine
from tests.support.servers import running

ROLLOUT = RolloutConfig(context_length=256, max_response_tokens=64)
STALE = "model.norm.weight"
TELL = ParityConfig(warn=0.001, stop=0.0)  # float32 differs by 1e-6


@dataclass(frozen=True)
class Trainer:
    config: Config
    policy: Model
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def trainer(tiny_model_dir: Path) -> Iterator[Trainer]:
    """The tiny model on one rank, in this process."""
    config = Config(
        model=ModelConfig(path=str(tiny_model_dir)), rollout=ROLLOUT, train=TrainConfig(micro_batch_size=4), parity=TELL
    )
    parallel = bootstrap.initialize(config.parallel, config.run.seed)
    try:
        policy = build_model(config, parallel, path=config.model.path)
        yield Trainer(config, policy, load_tokenizer(config.model.path))
    finally:
        bootstrap.shutdown()


@pytest.fixture(scope="module")
def wrong_rope_server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """The same weights, turned by the angles of another rope base than 10,000: near tokens hardly feel it."""
    override = json.dumps({"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}})
    rollout = replace(ROLLOUT, server_args=("--json-model-override-args", override))
    log_path = tmp_path_factory.mktemp("wrong-rope") / "sglang.log"
    with running(SGLangServer(str(tiny_model_dir), rollout, dtype="float32", log_path=log_path)) as server:
        yield server


def checked(
    trainer: Trainer,
    urls: Sequence[str],
    *,
    limits: ParityConfig = TELL,
    engine_temperature: float = 1.0,
    change: Callable[[Prompt], Prompt] = lambda prompt: prompt,
    told: bool = True,
    after_sync: Callable[[], None] = lambda: None,
) -> Parity:
    """One step's check of what the servers at `urls` sample, once they were brought to the trainer's weights.

    engine_temperature: what they sample at, while the trainer assumes rollout.temperature; change: what becomes
    of a prompt on its way to them; told: whether they say which prompt ids they got; after_sync: what happens to
    them before they sample.
    """
    config = replace(trainer.config, parity=limits, rollout=replace(ROLLOUT, urls=tuple(urls)))
    with synced(config, trainer) as parts:
        after_sync()
        rollouts = sampled(parts, engine_temperature, change, told)
        batch = collate(rollouts, [0.0] * len(rollouts), pad_token_id=0, device=trainer.policy.parallel.device)
        return ParityMonitor(parts).check(3, score(batch, trainer.policy, None, config), rollouts)


@contextmanager
def synced(config: Config, trainer: Trainer) -> Iterator[RunParts]:
    """A run whose servers, those of rollout.urls, hold the trainer's weights as version 0."""
    client = SGLangClient((), config.rollout, trainer.tokenizer.decode)
    engine = build_engine(config, trainer.policy, ServerFleet(config), client)
    try:
        engine.wait_ready()
        engine.sync(0)
        yield RunParts(config, trainer.policy, engine, client, trainer.tokenizer)
    finally:
        engine.close()
        for url in config.rollout.urls:  # other modules' tests share the server, and want one that no sync has named
            control.set_version(url, control.UNVERIFIED, 30.0)


def sampled(parts: RunParts, temperature: float, change: Callable[[Prompt], Prompt], told: bool) -> list[Rollout]:
    """Two responses to each of eight prompts; see `checked`."""
    prompts = [prompt_of(parts.tokenizer, i) for i in range(8)]
    sampling = SamplingParams(2, 64, temperature, 1.0, parts.tokenizer.eos_token_ids, seed=11)
    rollouts = parts.client.generate([change(p) for p in prompts], sampling)
    return [as_trained_on(r, prompts[i // 2], told) for i, r in enumerate(rollouts)]


def prompt_of(tokenizer: Tokenizer, i: int) -> Prompt:
    text = f"{i}+{9 - i}*{i + 1}="
    return Prompt(id=i, text=text, token_ids=tuple(tokenizer.encode(text)), answer="")


def as_trained_on(rollout: Rollout, prompt: Prompt, told: bool) -> Rollout:
    engine_prompt_ids = rollout.engine_prompt_ids if told else None
    return replace(rollout, prompt=prompt, engine_prompt_ids=engine_prompt_ids)


def kind_of(found: Parity) -> str | None:
    return found.diagnosis.kind if found.diagnosis else None


def test_a_healthy_server_is_accused_of_nothing(trainer: Trainer, sglang_server: SGLangServer) -> None:
    found = checked(trainer, [sglang_server.url])
    assert found.diagnosis is None
    assert found.metrics["mismatch/logprob_abs_max"] < 1e-4
    assert abs(found.metrics["mismatch/surprise"]) < 0.25  # its standard deviation is about 0.04
    assert found.config.algorithm == trainer.config.algorithm, "corrected"


def test_the_search_on_a_healthy_server_blames_neither_weights_tokens_nor_sampling(
    trainer: Trainer, sglang_server: SGLangServer
) -> None:
    # A threshold below rounding: the search runs, and whatever it says, it must not blame weights, tokens or sampling.
    found = checked(trainer, [sglang_server.url], limits=ParityConfig(warn=1e-12, stop=0.0))
    assert kind_of(found) == "numerics", found.diagnosis
    assert found.metrics["mismatch/logprob_abs_max"] < 1e-4


def test_one_stale_tensor_is_named(trainer: Trainer, sglang_server: SGLangServer) -> None:
    right = dict(hf_tensors(trainer.policy))[STALE].clone()

    def plant() -> None:
        load(sglang_server.url, STALE, right * 1.5)

    found = checked(trainer, [sglang_server.url], after_sync=plant)
    assert kind_of(found) == "weights", found.diagnosis
    assert found.diagnosis is not None and STALE in found.diagnosis.words and sglang_server.url in found.diagnosis.words
    assert "lm_head" not in found.diagnosis.words
    assert checked(trainer, [sglang_server.url]).diagnosis is None, "the next sync did not put it right"


@pytest.mark.parametrize("fault", ["stale", "rope"])
def test_servers_that_sleep_while_the_trainer_computes_are_asked_at_the_next_step(
    fault: str, trainer: Trainer, sglang_server: SGLangServer, wrong_rope_server: SGLangServer
) -> None:
    """With rollout.release_memory. What is known before is no proof: a scaled norm looks like a temperature."""
    url = (sglang_server if fault == "stale" else wrong_rope_server).url
    rollout = replace(ROLLOUT, urls=(url,), release_memory=True)
    config = replace(trainer.config, rollout=rollout)
    with synced(config, trainer) as parts:
        found, monitor = [], ParityMonitor(parts)
        for step in range(2):
            if step:
                parts.engine.sync(step)  # they take their memory again
            if fault == "stale":
                load(url, STALE, dict(hf_tensors(trainer.policy))[STALE] * 1.5)
            rollouts = sampled(parts, 1.0, lambda prompt: prompt, told=True)
            monitor.ask_while_awake(rollouts)
            parts.engine.release_memory()
            batch = collate(rollouts, [0.0] * len(rollouts), pad_token_id=0, device=trainer.policy.parallel.device)
            found.append(monitor.check(step, score(batch, trainer.policy, None, config), rollouts))
        parts.engine.sync(2)
    assert kind_of(found[0]) in ("unknown", "sampling") and "they sleep now" in str(found[0].diagnosis)
    assert kind_of(found[1]) == ("weights" if fault == "stale" else "numerics"), found[1].diagnosis
    assert (STALE if fault == "stale" else "suspect rope settings") in str(found[1].diagnosis)


def test_another_temperature_is_found(trainer: Trainer, sglang_server: SGLangServer) -> None:
    found = checked(trainer, [sglang_server.url], engine_temperature=0.7)
    assert kind_of(found) == "sampling", found.diagnosis
    assert found.diagnosis is not None
    (fitted,) = re.findall(r"those of temperature ([0-9.]+),", found.diagnosis.words)
    assert float(fitted) == pytest.approx(0.7, rel=0.005)


@pytest.mark.parametrize("server_side", [{"temperature": 0.0}, {"top_k": 3}], ids=["greedy", "top_k"])
def test_tokens_drawn_otherwise_than_their_right_log_probs_say_are_found(
    trainer: Trainer, sglang_server: SGLangServer, server_side: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_client, "generate_payloads", with_sampling(**server_side))
    found = checked(trainer, [sglang_server.url])
    assert found.metrics["mismatch/logprob_abs_max"] < 1e-4, "then log-probs alone would tell"
    assert kind_of(found) == "sampling", found.diagnosis
    assert found.metrics["mismatch/surprise"] < -0.3


@pytest.mark.parametrize("told", [True, False], ids=["told", "inferred"])
def test_another_chat_template_is_found(trainer: Trainer, sglang_server: SGLangServer, told: bool) -> None:
    found = checked(trainer, [sglang_server.url], change=as_a_turn, told=told)
    assert kind_of(found) == "tokenization", found.diagnosis
    assert found.diagnosis is not None and "The trainer's ids are those of the prompts' text" in found.diagnosis.words
    if told:
        assert (
            "16 of 16 responses" in found.diagnosis.words and "has 6 tokens here and 8 there" in found.diagnosis.words
        )


def test_a_wrong_rope_base_is_numerics_that_grow_with_the_position(
    trainer: Trainer, wrong_rope_server: SGLangServer
) -> None:
    found = checked(trainer, [wrong_rope_server.url])
    assert kind_of(found) == "numerics", found.diagnosis
    assert found.diagnosis is not None and wrong_rope_server.url in found.diagnosis.words
    assert "suspect rope settings" in found.diagnosis.words


def test_of_two_servers_the_one_with_the_wrong_rope_base_is_named(
    trainer: Trainer, sglang_server: SGLangServer, wrong_rope_server: SGLangServer
) -> None:
    found = checked(trainer, [sglang_server.url, wrong_rope_server.url])
    assert kind_of(found) == "numerics", found.diagnosis
    assert found.diagnosis is not None and "1 of 2 servers" in found.diagnosis.words
    assert wrong_rope_server.url in found.diagnosis.words and sglang_server.url not in found.diagnosis.words


def test_a_large_difference_is_corrected_or_ends_the_run(trainer: Trainer, wrong_rope_server: SGLangServer) -> None:
    found = checked(trainer, [wrong_rope_server.url], limits=ParityConfig(warn=0.001, correct=0.01, stop=0.0))
    assert found.config.algorithm.importance_correction == "truncated"
    with pytest.raises(ParityError, match=r"parity\.stop=0\.01.*numerics"):
        checked(trainer, [wrong_rope_server.url], limits=ParityConfig(stop=0.01))


def with_sampling(**changes: Any) -> Callable[..., list[dict[str, Any]]]:
    """`generate_payloads`, and what a server or something before it makes of them."""

    def changed(*args: Any) -> list[dict[str, Any]]:
        payloads = generate_payloads(*args)
        return [{**p, "sampling_params": [each | changes for each in p["sampling_params"]]} for p in payloads]

    return changed


def as_a_turn(prompt: Prompt) -> Prompt:
    """Behind and before the marks of a turn."""
    return replace(prompt, token_ids=(14, *prompt.token_ids, 13))


def load(url: str, name: str, tensor: torch.Tensor) -> None:
    """Put one tensor into a server, past every sync."""
    payload: dict[str, Any] = {
        "serialized_named_tensors": [base64.b64encode(pickle.dumps([(name, tensor.detach().clone())])).decode()],
        "flush_cache": True,
    }
    control.begin_update(url, 30.0)
    post_json(url, "update_weights_from_tensor", payload, 30.0)
    control.end_update(url, 30.0)
    control.flush_cache(url, 30.0)
