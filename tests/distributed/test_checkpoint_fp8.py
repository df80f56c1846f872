"""Checkpoints of a run in FP8: scales of recipe delayed as Transformer Engine keeps them, and FP8 parameters.

Neither is there on a CPU: layers with an `_extra_state` and FP8 tensors of our own stand in for Transformer Engine's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_rpp.checkpoint.find import find_checkpoint
from megatron_rpp.checkpoint.manager import Checkpointer
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.sharded import load_checkpoint
from megatron_rpp.config.job import CheckpointConfig
from megatron_rpp.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.optimizer import Optimizer, make_trainable
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.model.build import Model, build_empty, build_model
from megatron_rpp.model.fp8_params import is_fp8
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.load_hf import load_hf_weights
from megatron_rpp.model.load_megatron import load_megatron_weights
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext
from tests.distributed.invariance_worker import fixed_batch
from tests.support.fp8_stand_in import install, make_fp8
from tests.support.tiny_models import save_tiny

LINEAR = (ColumnParallelLinear, RowParallelLinear)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fp8")
    save_tiny("llama", root)
    return root / "llama"


@pytest.fixture(scope="module")
def parallel() -> Iterator[ParallelContext]:
    yield bootstrap.initialize(ParallelConfig(), seed=0)
    bootstrap.shutdown()


def config_of(source: Path, dtype: str = "bfloat16") -> Config:
    return Config(
        model=ModelConfig(path=str(source), dtype=dtype),
        train=TrainConfig(batch_size=8, micro_batch_size=8),
        optimizer=OptimizerConfig(lr=1e-2),
    )


def linears(model: Model) -> dict[str, Any]:
    """The layers that Transformer Engine would compute in FP8, by name."""
    found = {}
    for i, chunk in enumerate(model.chunks):
        bare: Any = getattr(chunk, "module", chunk)
        named = bare.decoder.named_modules()
        found |= {f"{i}.{name}": module for name, module in named if isinstance(module, LINEAR)}
    return found


class Scaled:
    """Gives Megatron's linear layers scales, [n] uint8 as Transformer Engine packs them: none in a new model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trusted: list[bool] = []  # at each reading, whether Transformer Engine would have unpickled

        def read(layer: Any, state: Tensor | None) -> None:
            if state is not None:
                self.trusted.append(os.environ.get("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE") == "1")
                layer.scales = state

        for kind in LINEAR:
            monkeypatch.setattr(kind, "get_extra_state", lambda layer: getattr(layer, "scales", None))
            monkeypatch.setattr(kind, "set_extra_state", read)

    def draw(self, model: Model, seed: int) -> dict[str, Tensor]:
        """New scales, of another length each time as pickles are; the same tensors are written to where they fit."""
        generator = torch.Generator().manual_seed(seed)
        for i, layer in enumerate(linears(model).values()):
            layer.scales = torch.randint(0, 256, (50 + 7 * i + seed,), dtype=torch.uint8, generator=generator)
        return self.of(model)

    def of(self, model: Model) -> dict[str, Tensor]:
        return {name: layer.scales.clone() for name, layer in linears(model).items()}


def delayed(model: Model) -> Model:
    """`model` with Megatron's settings of recipe delayed, which local layers pass over."""
    model.config.fp8, model.config.fp8_recipe = "hybrid", "delayed"
    return model


def save(run_dir: Path, source: Path, parts: tuple[Model, Optimizer], reference: Model | None, step: int = 1) -> Any:
    checkpointer = Checkpointer(run_dir, source, CheckpointConfig(background=True))
    state = RunState(step, {}, parts[1].schedule.state_dict())
    checkpointer.save(*parts, state, reference)
    return checkpointer


def found(run_dir: Path) -> Path:
    path = find_checkpoint(run_dir, verify=True)
    assert path is not None
    return path


def test_scales_of_policy_and_reference_are_those_of_the_moment_that_was_saved(
    tmp_path: Path, source: Path, parallel: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled, config = Scaled(monkeypatch), config_of(source, "float32")

    def build() -> tuple[tuple[Model, Optimizer], Model]:
        policy = delayed(build_model(config, parallel, path=str(source)))
        return make_trainable(policy, config.optimizer, 10), delayed(build_model(config, parallel, path=str(source)))

    parts, reference = build()
    batch, _, _ = add_advantages(fixed_batch(), config, parallel, ShapingState())
    train_step(*parts, batch, config)  # so that there are moments
    saved, saved_reference = scaled.draw(parts[0], 1), scaled.draw(reference, 2)
    checkpointer = save(tmp_path, source, parts, reference)
    for model in (parts[0], reference):  # the run goes on, while it is being written
        for layer in linears(model).values():
            layer.scales.zero_()
    checkpointer.wait()

    new_parts, new_reference = build()
    load_checkpoint(found(tmp_path), *new_parts, new_reference)
    for expected, model in ((saved, new_parts[0]), (saved_reference, new_reference)):
        scales = scaled.of(model)
        assert scales.keys() == expected.keys() and all(torch.equal(scales[name], expected[name]) for name in expected)
    assert scaled.trusted and all(scaled.trusted), "Transformer Engine would have refused to read them back"
    assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ

    # A model directory is another's file: its scales are not read, with whatever they hold.
    scaled.trusted.clear()
    other = build_model(config, parallel, path=str(source))
    load_megatron_weights(other.chunks, found(tmp_path))
    weights = zip(other.chunks[0].parameters(), parts[0].chunks[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights) and not scaled.trusted


def test_a_checkpoint_from_before_the_reference_had_scales_can_be_resumed(
    tmp_path: Path, source: Path, parallel: ParallelContext, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(source, "float32")
    parts = make_trainable(build_model(config, parallel, path=str(source)), config.optimizer, 10)
    reference = build_model(config, parallel, path=str(source))
    batch, _, _ = add_advantages(fixed_batch(), config, parallel, ShapingState())
    train_step(*parts, batch, config)
    save(tmp_path, source, parts, reference).wait()
    with caplog.at_level("INFO"):
        load_checkpoint(found(tmp_path), *parts, delayed(reference))
    assert any("no FP8 scales of the reference" in message for message in caplog.messages)


def fp8_model(config: Config, source: Path, parallel: ParallelContext, seed: int) -> Model:
    """A model as fp8.params makes it: FP8 matrices that were drawn at random, yet to be loaded."""
    torch.manual_seed(seed)
    model = build_empty(read_hf_config(str(source)), config, parallel)
    for layer in linears(model).values():
        make_fp8(layer)
    model.config.fp8_param, model.config.fp8_recipe = True, "tensorwise"
    return model


def fp8_policy(config: Config, source: Path, parallel: ParallelContext, seed: int) -> tuple[Model, Optimizer]:
    model = fp8_model(config, source, parallel, seed)
    load_hf_weights(model.chunks, model.hf, str(source), parallel, dtype=torch.bfloat16)
    return make_trainable(model, config.optimizer, 10)


def fp8_bytes(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    named = model.chunks[0].named_parameters()
    held: list[tuple[str, Any]] = [(name, each) for name, each in named if is_fp8(each)]
    assert held
    return {name: (each._data.clone(), each._scale_inv.clone()) for name, each in held}


def mains(policy: Model) -> list[Tensor]:
    return [each.main_param.clone() for each in policy.chunks[0].parameters()]


def test_fp8_parameters_train_from_the_loaded_values_and_resume_bit_for_bit(
    tmp_path: Path, source: Path, parallel: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    config = config_of(source)
    batch, _, _ = add_advantages(fixed_batch(), config, parallel, ShapingState())
    plain_policy, _ = make_trainable(build_model(config, parallel, path=str(source)), config.optimizer, 10)
    policy, optimizer = fp8_policy(config, source, parallel, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(mains(policy), mains(plain_policy), strict=True)), "rounded or drawn"

    train_step(policy, optimizer, batch, config)
    checkpointer = save(tmp_path, source, (policy, optimizer), None)
    saved = fp8_bytes(policy)
    train_step(policy, optimizer, batch, config)  # while it is being written
    checkpointer.wait()

    resumed = fp8_policy(config, source, parallel, seed=2)
    load_checkpoint(found(tmp_path), *resumed)
    for name, (data, scale) in fp8_bytes(resumed[0]).items():
        assert torch.equal(data, saved[name][0]) and torch.equal(scale, saved[name][1]), name
    train_step(*resumed, batch, config)
    for (name, now), then in zip(fp8_bytes(resumed[0]).items(), fp8_bytes(policy).values(), strict=True):
        assert torch.equal(now[0], then[0]) and torch.equal(now[1], then[1]), name
    assert all(torch.equal(a, b) for a, b in zip(mains(resumed[0]), mains(policy), strict=True))

    # As a model directory: its bfloat16 weights are what training would start from, whatever the parameters are.
    other = fp8_model(config, source, parallel, seed=3)
    load_megatron_weights(other.chunks, found(tmp_path))
    whole = build_model(config, parallel, path=str(source))
    load_megatron_weights(whole.chunks, found(tmp_path))
    started = [make_trainable(model, config.optimizer, 10)[0] for model in (other, whole)]
    assert all(torch.equal(a, b) for a, b in zip(mains(started[0]), mains(started[1]), strict=True))
