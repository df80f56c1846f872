"""The long chain-of-thought benchmark's figures are of what its keys name, on lengths that are the recorded ones."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.long_cot import summarize_training
from benchmarks.long_cot_balance import REPLICAS, dp_imbalance, sizes_of
from benchmarks.long_cot_lengths import Lengths, load
from benchmarks.long_cot_proxy import LengthProxy, length_of, with_lengths
from benchmarks.long_cot_rollout import PLAIN, SLOTS, Load, Step, overlap, steps_of, summarize
from benchmarks.long_cot_schedule import model_part
from benchmarks.long_cot_train import MODES, prepared, random_batch
from megatron_rpp.config.schema import Config, RolloutConfig, TrainConfig
from megatron_rpp.observability.writers import MetricsWriter

SMALL = Lengths(groups=((10, 20, 30), (5, 100, 7)), limit=100, prompt_tokens=4)


def test_the_record_is_the_one_whose_sum_its_source_gives() -> None:
    lengths = load()
    assert sum(map(sum, lengths.groups)) == 4_177_745
    assert {len(group) for group in lengths.groups} == {10} and len(lengths.groups) == 48
    assert max(map(max, lengths.groups)) == lengths.limit == 30_000


def test_scaling_keeps_every_response_and_never_makes_one_empty() -> None:
    short = SMALL.scaled(16)
    assert short.groups == ((1, 1, 2), (1, 6, 1)) and (short.limit, short.prompt_tokens) == (6, 1)


def test_a_draw_has_a_prompts_own_samples() -> None:
    drawn = SMALL.draw(random.Random(0), prompts=50, samples=2)
    assert {frozenset(group) for group in drawn} <= {
        frozenset(pair) for group in SMALL.groups for pair in ((a, b) for a in group for b in group if a != b)
    }


def test_quantiles_stand_for_the_whole_record() -> None:
    assert SMALL.quantiles(2) == [7, 30] and SMALL.quantiles(6) == [5, 7, 10, 20, 30, 100]
    lengths = load()
    of_all = lengths.describe()["mean"]
    assert abs(sum(lengths.quantiles(32)) / 32 / of_all - 1) < 0.02


def of_mode(seconds: list[float], positions: int, grad_norm: float = 1.0) -> dict[str, Any]:
    kinds = {"seconds": seconds, "score_seconds": [s / 4 for s in seconds], "cpu_seconds": [2 * s for s in seconds]}
    return {**kinds, "positions": positions, "grad_norm": grad_norm}


def test_the_speedup_is_over_the_maximum_and_waste_is_of_the_packed_positions() -> None:
    found = summarize_training(
        {
            "packed": of_mode([2.0, 4.0, 3.0], 125),
            "padded_to_batch": of_mode([6.0, 6.0, 90.0], 200, 1.25),
            "padded_to_maximum": of_mode([12.0, 12.0, 12.0], 400),
        },
        rows=[40, 60],
    )
    assert (found["speedup_over_padding"], found["speedup_over_padding_to_batch"]) == (4.0, 2.0)
    assert found["padding_waste"] == 1 - 100 / 125
    assert found["tokens_per_s"]["packed"] == 100 / 3.0
    assert found["grad_norm_difference"] == 0.2


def test_the_modes_train_on_the_same_rows_and_differ_in_padding_alone() -> None:
    config = Config(
        rollout=RolloutConfig(context_length=50),
        train=TrainConfig(batch_size=2, micro_batch_tokens=50, micro_batch_size=1),
    )
    batch = random_batch([9, 30, 12, 7], 4, vocab_size=20, config=config)
    assert batch.loss_mask.sum(dim=1).tolist() == [5.0, 26.0, 8.0, 3.0]
    widths = {}
    for mode in MODES:
        given, settings = prepared(batch, config, mode)
        assert (given.tokens[:, :30] == batch.tokens).all() and given.loss_mask.sum() == batch.loss_mask.sum()
        widths[mode] = (given.tokens.shape[1], settings.train.micro_batch_tokens)
    assert widths == {"packed": (30, 50), "padded_to_batch": (30, 0), "padded_to_maximum": (50, 0)}


def test_replicas_sample_their_own_prompts_and_the_deal_evens_them_out() -> None:
    drawn = [[group, group + 1] for group in range(2 * REPLICAS)]
    assert [(s.group_id, s.tokens) for s in sizes_of(drawn, 10)[3]] == [(3, 13), (3, 14), (11, 21), (11, 22)]
    found = dp_imbalance(load(), steps=1)
    assert found["dp_imbalance"] < 0.05 < found["dp_imbalance_as_sampled"]


def test_over_sampling_pays_where_servers_have_free_slots() -> None:
    """On the record, with long prompts put off at most twice: on average, not only in the steps that put them off."""
    found = model_part(load(), steps=40)
    ratio = found["model_rollout_ratio"]
    assert ratio["plain"] == 1 and found["model_wasted_tokens"]["plain"] == 0
    assert ratio["over_sampling_1.25"] < 0.9 and ratio["over_sampling_1.5"] < 0.8


def test_idle_slots_and_the_tail_are_those_of_the_steps_alone() -> None:
    steps = [Step(start=10.0, rollout_s=6.0, step_s=10.0)]
    loads = [
        Load(9.0, SLOTS),
        Load(12.0, PLAIN // 4),
        Load(14.0, 0),
        Load(15.0, SLOTS),
        Load(16.0, 0),
        Load(30.0, SLOTS),
    ]
    found = summarize(steps, loads)
    assert found["engine_idle"] == pytest.approx(1 - (2 + 0.125 * 2 + 1) / 10)
    assert found["tail_s"] == pytest.approx(3.0)  # 12 to 15; what follows the sampling is no tail
    assert found["trainer_idle"] == pytest.approx(0.6)
    assert overlap(0, 5, 4, 9) == 1 and overlap(0, 5, 6, 9) == 0


def test_a_step_begins_with_its_first_request_and_the_first_step_does_not_count(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in range(3):
        writer.write(step, {"time/rollout": 2.0, "time/step": 5.0})
    writer.close()
    starts = [100.0, 100.5, 105.0, 106.9, 110.0, 110.1]
    assert steps_of(tmp_path, starts) == [Step(105.0, 2.0, 5.0), Step(110.0, 2.0, 5.0)]


def test_a_response_gets_its_prompts_recorded_length_whatever_it_is_asked_with() -> None:
    params = [{"max_new_tokens": 99, "sampling_seed": seed, "ignore_eos": False} for seed in range(40)]
    payload = {"input_ids": [[1, 2]] * 40, "sampling_params": params, "rid": ["x"] * 40}
    forced = with_lengths(payload, SMALL)
    found = [each["max_new_tokens"] for each in forced["sampling_params"]]
    assert set(found) in ({10, 20, 30}, {5, 100, 7}), "all of one prompt, and each of its lengths"
    assert found[3] == length_of([1, 2], 3, SMALL)
    assert all(each["ignore_eos"] for each in forced["sampling_params"]) and forced["rid"] == payload["rid"]


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(418 if self.path == "/teapot" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def echo() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_the_proxy_changes_requests_for_responses_alone() -> None:
    payload = {"input_ids": [[1]], "sampling_params": [{"max_new_tokens": 9, "sampling_seed": 1}]}
    with echo() as url, LengthProxy(url, SMALL) as proxy:
        forced = requests.post(f"{proxy.url}/generate", json=payload, timeout=10).json()
        assert forced == with_lengths(payload, SMALL) != payload
        other = requests.post(f"{proxy.url}/teapot", json=payload, timeout=10)
        assert (other.status_code, other.json()) == (418, payload)
        assert len(proxy.starts) == 1
