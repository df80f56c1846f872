"""A real SGLang server brought to new weights by changes alone holds what it would hold after a full load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.rollout import control
from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.in_server.delta_loader import LOADER
from megatron_rpp.rollout.sglang_server import SGLangServer
from megatron_rpp.weight_sync import delta
from megatron_rpp.weight_sync.delta import DeltaEncoder
from tests.support.servers import running

DEADLINE_S = 120.0
LEARNING_RATE = 5e-7
BUCKET_BYTES = 100_000

Checksums = list[dict[str, str]]  # by server parameter, an entry a TP rank


class Trainer:
    """Float32 master weights, moved as Adam moves them, beside a server that holds them in its dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        torch.manual_seed(11)
        shape = LlamaConfig(
            vocab_size=300,  # a server pads it to 320
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.02,
            bos_token_id=None,
            pad_token_id=0,
            eos_token_id=1,
        )
        self.master, self.dtype, self.folder = LlamaForCausalLM(shape), dtype, folder
        self.save()

    def weights(self) -> dict[str, Tensor]:
        return {name: t.detach().to(self.dtype) for name, t in self.master.state_dict().items()}

    def step(self, lr: float = LEARNING_RATE) -> None:
        """Each weight moves by lr, up or down: what Adam does where a gradient keeps its sign."""
        with torch.no_grad():
            for parameter in self.master.parameters():
                parameter += lr * torch.sign(torch.randn_like(parameter))

    def save(self) -> None:
        self.master.save_pretrained(self.folder, state_dict=self.weights())


class Live:
    """The server, the trainer beside it, and what was last sent."""

    def __init__(self, server: SGLangServer, tp_size: int, trainer: Trainer) -> None:
        self.url, self.tp_size, self.trainer = server.url, tp_size, trainer
        self.encoder = DeltaEncoder()
        self.is_alive = server.is_alive

    def checksums(self) -> Checksums:
        ranks = control.checksums(self.url, (), DEADLINE_S)
        assert len(ranks) == self.tp_size
        return [dict(rank["checksums"]) for rank in ranks]

    def full_load(self) -> Checksums:
        """The server loads the trainer's weights from disk, and they become the base."""
        self.trainer.save()
        body: dict[str, object] = {"model_path": str(self.trainer.folder), "flush_cache": False}
        post_json(self.url, "update_weights_from_disk", body, DEADLINE_S)
        for name, tensor in self.trainer.weights().items():
            self.encoder.remember(name, tensor)
        return self.checksums()

    def delta(self) -> tuple[int, list[str]]:
        """(bytes on the wire, failures) of one sync."""
        buckets = list(self.encoder.encode(self.trainer.weights().items(), BUCKET_BYTES))
        self.post(*(delta.payload(bucket, self.tp_size) for bucket in buckets))
        return sum(bucket.wire_bytes for bucket in buckets), self.failures()

    def post(self, *bodies: dict[str, object]) -> None:
        control.begin_update(self.url, DEADLINE_S)
        for body in bodies:
            post_json(self.url, delta.ENDPOINT, body, DEADLINE_S)
        control.end_update(self.url, DEADLINE_S)

    def failures(self) -> list[str]:
        return delta.failures(control.checksums(self.url, delta.STATUS_SKIP, DEADLINE_S))

    def full_bytes(self) -> int:
        return sum(t.nbytes for t in self.trainer.weights().values())


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """In bfloat16 on two ranks; test_sync_layouts sends deltas in float32 and to one rank too."""
    folder = tmp_path_factory.mktemp("delta")
    trainer = Trainer(folder / "model", torch.bfloat16)
    rollout = RolloutConfig(context_length=64, server_tensor=2)
    log_path = folder / "sglang.log"
    server = SGLangServer(str(trainer.folder), rollout, dtype="bfloat16", log_path=log_path, weight_loader=LOADER)
    with running(server):
        yield Live(server, rollout.server_tensor, trainer)


def test_deltas_leave_the_server_as_a_full_load_would(live: Live) -> None:
    before = live.full_load()
    for _ in range(3):
        live.trainer.step()
        sent, failed = live.delta()
        assert failed == []
        share = sent / live.full_bytes()
        after = live.checksums()
        assert after != before, "no value has changed, so the delta proves nothing"
        before = after
        assert share < 0.4, f"a delta at lr {LEARNING_RATE} took {share:.1%} of the full bytes"
    assert live.full_load() == after


def test_a_large_step_is_sent_whole_and_right(live: Live) -> None:
    live.full_load()
    live.trainer.step(lr=0.01)
    _, failed = live.delta()
    assert failed == []
    after = live.checksums()
    assert live.full_load() == after


def test_everything_is_sent_after_a_failure_and_repairs_a_half_sent_sync(live: Live) -> None:
    live.full_load()
    live.trainer.step(lr=1e-4)
    first, *_ = live.encoder.encode(live.trainer.weights().items(), BUCKET_BYTES)
    live.post(delta.payload(first, live.tp_size))
    live.encoder.forget()
    live.trainer.step(lr=1e-4)
    sent, failed = live.delta()
    assert failed == [] and sent > live.full_bytes()
    after = live.checksums()
    assert live.full_load() == after


def test_what_is_no_delta_is_told_by_every_rank_and_none_waits_for_another(live: Live) -> None:
    before = live.full_load()
    (bucket,) = DeltaEncoder().encode([("model.norm.weight", torch.zeros(128, dtype=live.trainer.dtype))], BUCKET_BYTES)
    body = delta.payload(bucket, live.tp_size)
    entries = body["serialized_named_tensors"]
    assert isinstance(entries, list)
    live.post({**body, "serialized_named_tensors": entries[::-1]})  # the first rank gets nothing
    told = live.failures()
    assert len(told) == live.tp_size and all("DeltaError: a delta is made of" in text for text in told)
    live.post(delta.forget_failures(live.tp_size))
    assert live.failures() == [] and live.checksums() == before


def test_a_change_that_does_not_fit_is_told_and_the_server_lives(live: Live) -> None:
    live.full_load()
    name = "model.norm.weight"  # a projection too small would be padded in silence by SGLang on CPU
    encoder = DeltaEncoder()
    (bucket,) = encoder.encode([(name, torch.zeros(3, dtype=live.trainer.dtype))], BUCKET_BYTES)
    live.post(delta.payload(bucket, live.tp_size))
    told = live.failures()
    assert len(told) == live.tp_size and all(
        f"server rank {i}: " in text and name in text for i, text in enumerate(told)
    )
    live.post(delta.forget_failures(live.tp_size))
    assert live.failures() == [] and live.is_alive()
    live.trainer.step()
    _, failed = live.delta()
    assert failed == []
    after = live.checksums()
    assert live.full_load() == after
