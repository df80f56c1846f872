"""A real SGLang server on CPU against transformers: tokens, log-probs, seeds, and no process left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.rollout.http import get_json
from megatron_rpp.rollout.payloads import generate_payloads
from megatron_rpp.rollout.protocol import RolloutError, SamplingParams
from megatron_rpp.rollout.sampler import Sampler, open_session
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.rollout.sglang_server import SGLangServer

EOS = 1
TEXTS = ("1+2=", "34*5=", "9-87=", "0")
Sample = Callable[..., list[Rollout]]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model_dir))
    model.load_state_dict(load_file(tiny_model_dir / "model.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def prompts(tiny_model_dir: Path) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return [Prompt(i, text, tuple(tokenizer.encode(text)), "") for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def client(sglang_server: SGLangServer, tiny_model_dir: Path) -> SGLangClient:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return SGLangClient([sglang_server.url], RolloutConfig(context_length=256, max_retries=0), tokenizer.decode)


@pytest.fixture(scope="module")
def sample(client: SGLangClient) -> Sample:
    def run(
        prompts: Sequence[Prompt],
        *,
        samples: int,
        temperature: float,
        seed: int = 0,
        group_ids: Sequence[int] | None = None,
    ) -> list[Rollout]:
        params = SamplingParams(
            num_samples_per_prompt=samples,
            max_response_tokens=32,
            temperature=temperature,
            top_p=1.0,
            stop_token_ids=(EOS,),
            seed=seed,
        )
        return client.generate(prompts, params, group_ids=group_ids)

    return run


def response_logprobs(model: PreTrainedModel, rollout: Rollout, temperature: float) -> torch.Tensor:
    """Tempered log-probs of the response's tokens by transformers, [response]."""
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]


def test_greedy_tokens_equal_those_of_transformers(
    model: PreTrainedModel, prompts: list[Prompt], sample: Sample
) -> None:
    for rollout in sample(prompts, samples=1, temperature=0.0):
        ids = torch.tensor([rollout.prompt.token_ids])
        expected = model.generate(ids, max_new_tokens=32, do_sample=False, attention_mask=torch.ones_like(ids))
        assert rollout.response_ids == tuple(expected[0, ids.shape[1] :].tolist())


def test_logprobs_are_those_of_the_tempered_distribution(
    model: PreTrainedModel, prompts: list[Prompt], sample: Sample
) -> None:
    for rollout in sample(prompts, samples=2, temperature=0.7):
        got = torch.tensor(rollout.rollout_logprobs)
        torch.testing.assert_close(got, response_logprobs(model, rollout, 0.7), atol=1e-4, rtol=0)
        untempered = response_logprobs(model, rollout, 1.0)
        assert (got - untempered).abs().max() > 1e-2, "the check above cannot tell the two apart"


def test_a_seed_gives_the_same_tokens_in_any_batch(prompts: list[Prompt], sample: Sample) -> None:
    together = sample(prompts, samples=4, temperature=1.0, seed=5)
    alone = sample(prompts[2:3], samples=4, temperature=1.0, seed=5, group_ids=[2])
    assert [r.response_ids for r in alone] == [r.response_ids for r in together[8:12]]
    assert len({r.response_ids for r in alone}) > 1, "samples of one prompt must differ"
    other = sample(prompts[2:3], samples=4, temperature=1.0, seed=6, group_ids=[2])
    assert [r.response_ids for r in other] != [r.response_ids for r in alone]


def test_seeded_samples_follow_the_models_distribution(
    model: PreTrainedModel, prompts: list[Prompt], sample: Sample
) -> None:
    count = 2000
    rollouts = sample(prompts[:1], samples=count, temperature=1.0, seed=11)
    first = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=16) / count
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompts[0].token_ids])).logits[0, -1], dim=-1)
    assert (first - expected).abs().max() < 0.05  # 4.5 standard deviations at p = 0.5


def test_a_stopped_response_ends_with_the_stop_token_and_its_text_does_not(
    prompts: list[Prompt], sample: Sample
) -> None:
    rollouts = sample(prompts, samples=8, temperature=1.0)
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    cut = [r for r in rollouts if r.finish_reason == "length"]
    assert stopped and cut and len(stopped) + len(cut) == len(rollouts), "the model should give both kinds"
    for rollout in stopped:
        assert rollout.response_ids[-1] == EOS and EOS not in rollout.response_ids[:-1]
        assert len(rollout.rollout_logprobs) == len(rollout.response_ids)
        assert "<eos>" not in rollout.text
    assert all(len(r.response_ids) == 32 and EOS not in r.response_ids for r in cut)


def test_an_abort_ends_the_samples_on_the_server(sglang_server: SGLangServer, prompts: list[Prompt]) -> None:
    """The connection of the first request stays open, so that nothing but the abort can end it; that of the second
    is closed by the cancellation.
    """
    url, many = sglang_server.url, 192
    [payload] = generate_payloads(prompts[:1], [0], SamplingParams(many, 240, 1.0, 1.0, (EOS,), seed=0), 256)
    for params in payload["sampling_params"]:
        params["ignore_eos"] = True

    async def run() -> tuple[list[Any], float]:
        async with open_session() as session:
            sampler = Sampler([url], RolloutConfig(), None, session)
            names = [f"held-{i:03}" for i in range(many)]
            held = asyncio.create_task(session.post(f"{url}/generate", json=payload | {"rid": names}))
            await _until(lambda: num_requests(url) == many)
            await sampler._abort(url, names)
            samples = await (await held).json()
            task = asyncio.create_task(sampler.send(payload, 0))
            await _until(lambda: num_requests(url) == many)
            cancelled = time.monotonic()
            task.cancel()
            await asyncio.wait([task])
            await sampler.finish()
            await _until(lambda: num_requests(url) == 0)
            return samples, time.monotonic() - cancelled

    samples, took_s = asyncio.run(asyncio.wait_for(run(), 120))
    ends = [each["meta_info"]["finish_reason"]["type"] for each in samples]
    assert ends.count("abort") > many / 2, "the server went on to the end"
    assert took_s < 10


def num_requests(url: str) -> int:
    """Requests that the server runs or has waiting."""
    loads: Any = get_json(url, "v1/loads?include=core", timeout_s=10.0)["loads"]
    return sum(each["num_running_reqs"] + each["num_waiting_reqs"] for each in loads)


async def _until(is_true: Callable[[], bool]) -> None:
    while not await asyncio.to_thread(is_true):
        await asyncio.sleep(0.02)


def test_an_unsynced_server_has_no_policy_version(prompts: list[Prompt], sample: Sample) -> None:
    assert {r.policy_version for r in sample(prompts[:1], samples=1, temperature=1.0)} == {-1}


def test_the_servers_own_refusal_reaches_the_user(client: SGLangClient, prompts: list[Prompt]) -> None:
    params = SamplingParams(1, 4, -1.0, 1.0, (EOS,), 0)
    with pytest.raises(RolloutError, match="temperature must be"):
        client.generate(prompts[:1], params)


def test_no_server_process_outlives_a_killed_trainer(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Killed while the server starts: SGLang's workers do not yet watch their own parent then."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER, str(tiny_model_dir), str(tmp_path / "log.txt")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    group = int(trainer.stdout.readline())
    assert _wait_until(lambda: len(_members(group)) >= 4, 120), "no scheduler and detokenizer came up"
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    assert _wait_until(lambda: not _members(group), 10), f"left behind: {_members(group)}"


def test_stop_leaves_no_process(sglang_server: SGLangServer) -> None:
    """Of a server that has worked: conftest.py has this test run last."""
    group = sglang_server.pid
    assert group is not None and len(_members(group)) >= 4
    sglang_server.stop()
    assert _members(group) == []
    assert not sglang_server.is_alive()


_TRAINER = """
import sys, time
from pathlib import Path
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.rollout.sglang_server import SGLangServer
rollout, log_path = RolloutConfig(context_length=256), Path(sys.argv[2])
server = SGLangServer(sys.argv[1], rollout, dtype="float32", log_path=log_path)
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


def _wait_until(is_true: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not is_true() and time.monotonic() < end:
        time.sleep(0.1)
    return is_true()


def _members(group: int) -> list[int]:
    """Processes of a process group that run."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found
