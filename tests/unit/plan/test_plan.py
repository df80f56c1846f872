"""`rpp plan` on known models: their published sizes, what fits, and what is told where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.commands import plan as command
from megatron_rpp.config import Config
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import build
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.plan import plan, suggest
from megatron_rpp.plan.buffers import lay_out
from megatron_rpp.plan.fake_rank import fake_rank
from megatron_rpp.plan.in_flight import chunks_in_flight
from megatron_rpp.plan.memory import GIB, RESERVE_BYTES
from tests.support.llama3 import LLAMA3_8B

LLAMA3_405B = {
    **LLAMA3_8B,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
}
# As their authors count them. DeepSeek-V3's 671,026,419,200 include the 58 x 256 selection biases, which are buffers.
TOTALS = {
    "llama3_8b": (LLAMA3_8B, 8_030_261_248),
    "llama3_405b": (LLAMA3_405B, 405_853_388_800),
    "qwen3_30b_a3b": (QWEN3_30B_A3B, 30_532_122_624),
    "deepseek_v3": (DEEPSEEK_V3, 671_026_419_200 - 58 * 256),
}
Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(LLAMA3_8B, {"parallel.tensor": 2}): bfloat16, 2048 tokens, servers elsewhere."""

    def made(model: dict[str, Any], changes: dict[str, Any] | None = None) -> Config:
        (tmp_path / "config.json").write_text(json.dumps(model))
        base = {
            "model.path": str(tmp_path),
            "model.dtype": "bfloat16",
            "slurm.rollout_nodes": 1,
            "rollout.num_prompts": 1024,
            "train.batch_size": 1024,
            "train.micro_batch_size": 1,
        }
        return build({**base, **(changes or {})})

    return made


@pytest.mark.parametrize("name", TOTALS)
def test_a_model_has_as_many_parameters_as_its_authors_say(make: Make, name: str) -> None:
    model, total = TOTALS[name]
    assert plan(make(model)).total_parameters == total


def test_stages_hold_the_whole_model_once(make: Make) -> None:
    split = {"parallel.pipeline": 16, "parallel.first_stage_layers": 3, "parallel.last_stage_layers": 2}
    found = plan(make(DEEPSEEK_V3, {**split, "parallel.expert": 64}), gpus=1024)
    dense = 58 * 256 * 3 * 7168 * 2048  # elements of all experts
    held = sum(stage.parameters for stage in found.stages)
    assert held == found.total_parameters - dense + dense // 64
    assert [stage.num_layers for stage in found.stages] == [3, *[4] * 14, 2]


def test_every_part_of_a_dense_model_on_one_gpu_by_hand(make: Make) -> None:
    """bfloat16 weights and reference, float32 gradients, main parameters and moments; one microbatch of 2048."""
    found = plan(make(LLAMA3_8B, {"optimizer.distributed": False}))
    (stage,), total = found.stages, 8_030_261_248
    assert (stage.parameter_bytes, stage.reference_bytes) == (2 * total, 2 * total)
    assert (stage.gradient_bytes, stage.optimizer_bytes) == (4 * total, 12 * total)
    assert stage.sync_bytes == 2 * 256 * 2**20
    assert stage.logits_bytes == pytest.approx(2048 * 128256 * 2, rel=0.001)
    # A token and layer: what goes into both norms, and comes out; mixed qkv, rotated q and k, the angles' cosines and
    # sines for each, attention's output; gate and up, silu(gate), Megatron's copy of up (`glu_linear_offset` is added
    # to it) and the product; float32 a head and a norm. Behind the layers the last norm's two.
    norms, attention, mlp = 4 * 4096, 6144 + 4096 + 1024 + 4 * 128 + 4096, 5 * 14336
    token = 32 * (2 * (norms + attention + mlp) + 4 * (32 + 2)) + 2 * 2 * 4096
    assert stage.activation_bytes == pytest.approx(2048 * token, rel=0.001)


def test_the_distributed_optimizer_divides_over_data_parallel_ranks(make: Make) -> None:
    one, eight = (plan(make(LLAMA3_8B), gpus).worst for gpus in (1, 8))
    assert eight.optimizer_bytes == pytest.approx(one.optimizer_bytes / 8, rel=0.01)
    assert eight.gradient_bytes == pytest.approx(one.gradient_bytes, rel=0.001)


def test_experts_optimizer_state_divides_over_the_ranks_that_hold_the_same_expert(make: Make) -> None:
    experts = 48 * 128 * 3 * 2048 * 768
    found = plan(make(QWEN3_30B_A3B, {"parallel.expert": 8}), gpus=16).worst
    rest = 30_532_122_624 - experts
    assert found.optimizer_bytes == pytest.approx(12 * (experts / 8 / 2 + rest / 16), rel=0.01)


def test_sequence_parallelism_saves_activations(make: Make) -> None:
    plain, split = (plan(make(LLAMA3_8B, {"parallel.tensor": 8, "parallel.sequence": s})) for s in (False, True))
    # Whole without it: what goes into both norms of each layer, and comes out; and of the last norm.
    whole = (32 * 4 + 2) * 2048 * 4096 * 2
    assert plain.worst.activation_bytes - split.worst.activation_bytes == pytest.approx(whole * 7 / 8, rel=0.001)


def test_context_parallel_ranks_share_tokens_and_the_optimizer_but_no_weights(make: Make) -> None:
    packed = {"train.micro_batch_tokens": 16384, "rollout.context_length": 8192}
    one, two = (plan(make(LLAMA3_8B, {**packed, "parallel.context": size}), gpus=2).worst for size in (1, 2))
    assert two.parameters == one.parameters and two.gradient_bytes == one.gradient_bytes
    assert two.optimizer_bytes == one.optimizer_bytes, "over 1 x 2 ranks as over 2 x 1"
    assert two.activation_bytes == pytest.approx(one.activation_bytes / 2, rel=0.001)
    assert two.logits_bytes == pytest.approx(one.logits_bytes / 2, rel=0.001)


def test_a_packed_microbatch_needs_what_as_many_padded_tokens_need(make: Make) -> None:
    rows = plan(make(LLAMA3_8B, {"train.micro_batch_size": 4})).worst
    packed = plan(make(LLAMA3_8B, {"train.micro_batch_tokens": 4 * 2048})).worst
    assert packed.logits_bytes == rows.logits_bytes
    assert packed.activation_bytes == pytest.approx(rows.activation_bytes, rel=0.05)  # rotated q and k are cut by slot


def test_long_packed_sequences_that_do_not_fit_are_told_to_use_context_parallelism(make: Make) -> None:
    config = make({**LLAMA3_8B, "max_position_embeddings": 131072},
                  {"rollout.context_length": 131072, "train.micro_batch_tokens": 131072})  # fmt: skip
    better = suggest(config, 32, 80 * GIB)
    assert better is not None and better.settings.get("parallel.context", 1) > 1 and better.plan.fits(80 * GIB)


def test_a_reference_is_counted_only_where_there_is_a_kl(make: Make) -> None:
    assert plan(make(LLAMA3_8B, {"algorithm.kl_coef": 0.0})).worst.reference_bytes == 0


def test_latent_attention_of_transformer_engine_copies_its_down_projections(make: Make) -> None:
    split = {"parallel.tensor": 8, "parallel.sequence": True, "parallel.expert": 8}
    engine, local = (plan(make(DEEPSEEK_V3, {**split, "model.layer_spec": s})).worst for s in ("auto", "local"))
    assert engine.parameters - local.parameters == 61 * 7168 * (1536 + 512 + 64) * 7 // 8


@pytest.mark.parametrize(
    ("stages", "chunks", "microbatches", "expected"),
    [
        (1, 1, 8, [[1]]),
        (4, 1, 8, [[4], [3], [2], [1]]),
        (4, 1, 2, [[2], [2], [2], [1]]),
        (2, 2, 8, [[3, 2], [2, 1]]),  # warm-up of 4 and of 2, and one forward more
        (2, 2, 1, [[2, 2], [2, 1]]),  # filled up to two microbatches
    ],
)
def test_microbatches_in_flight(stages: int, chunks: int, microbatches: int, expected: list[list[int]]) -> None:
    layout = ParallelConfig(pipeline=stages, virtual_pipeline=chunks)
    assert [chunks_in_flight(layout, stage, microbatches) for stage in range(stages)] == expected


def test_a_buffer_is_padded_as_megatrons_is() -> None:
    """Reversed: 10 at 0, 100 at 64; the end, 164, goes to 256; two ranks of 128 update 10 + 64 and 36."""
    buffer = lay_out([100, 10], 2, distributed=True)
    assert (buffer.length, buffer.updated) == (256, (74, 36))
    assert lay_out([100, 10], 2, distributed=False).length == 110


def test_overlapped_sums_have_padded_buckets_on_the_first_stage(make: Make) -> None:
    """Of Llama 3 8B on two stages: an embedding, and layers that fill a bucket with almost every matrix."""
    settings = {"parallel.pipeline": 2, "parallel.data": 7, "rollout.num_prompts": 14, "train.batch_size": 14}
    at_once = plan(make(LLAMA3_8B, settings)).stages
    overlapped = plan(make(LLAMA3_8B, {**settings, "optimizer.overlap_grad_reduce": True})).stages
    padding = [(b.gradient_bytes - a.gradient_bytes) // 4 for a, b in zip(at_once, overlapped, strict=True)]
    assert 16 * 4 * 7 * 128 > padding[0] > 0 == padding[1]


@pytest.mark.parametrize("bucket", [500, 1024, 5000])
def test_a_buffer_in_buckets_is_as_long_as_megatrons(bucket: int) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    sizes = [1000, 10, 333, 700, 64, 5, 2048, 90]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=bucket
    )
    with fake_rank(ParallelConfig(data=4)):
        module = torch.nn.ParameterList([torch.nn.Parameter(torch.empty(size)) for size in sizes])
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        (buffer,) = DistributedDataParallel(config=config, ddp_config=ddp_config, module=module).buffers
    assert lay_out(sizes, 4, distributed=True, bucket=bucket).length == buffer.numel
    assert (len(buffer.buckets) > 1) == (bucket < 5000)


def test_a_model_too_large_is_told_the_setting_that_makes_it_fit(make: Make) -> None:
    config = make(LLAMA3_8B, {"parallel.tensor": 2, "train.micro_batch_size": 8, "rollout.context_length": 8192})
    found = plan(config, gpus=16)
    assert not found.fits(80 * GIB)
    better = suggest(config, 16, 80 * GIB)
    assert better is not None and len(better.settings) == 1 and better.plan.fits(80 * GIB)
    again = plan(make(LLAMA3_8B, {"parallel.tensor": 2, "train.micro_batch_size": 8, "rollout.context_length": 8192,
                                  **better.settings}), gpus=16)  # fmt: skip
    assert again == better.plan


def test_without_a_layout_the_smallest_that_fits_is_proposed(make: Make) -> None:
    """No smaller number of ranks a replica fits, and it is one of exactly the GPUs that there are."""
    config = make(LLAMA3_405B)
    better = suggest(config, 1024, 80 * GIB)
    assert better is not None and better.plan.fits(80 * GIB) and better.plan.gpus == 1024
    ranks = better.plan.layout.tensor * better.plan.layout.pipeline
    half = {**better.settings, "parallel.tensor": better.plan.layout.tensor // 2}
    assert ranks > 8 and not plan(make(LLAMA3_405B, half), 1024).fits(80 * GIB)


def test_where_no_layout_fits_more_gpus_are_proposed(make: Make) -> None:
    better = suggest(make(LLAMA3_8B), 1, 80 * GIB)
    assert better is not None and better.plan.gpus in (2, 4) and better.plan.fits(80 * GIB)
    assert suggest(make(LLAMA3_8B), 1, 4 * GIB) is None


def test_servers_on_the_trainers_gpus_need_room_for_their_weights(make: Make) -> None:
    split = {"parallel.tensor": 8, "parallel.sequence": True, "slurm.rollout_nodes": 0}
    apart = plan(make(LLAMA3_8B, {**split, "slurm.rollout_nodes": 1}))
    beside = plan(make(LLAMA3_8B, split))
    asleep = plan(make(LLAMA3_8B, {**split, "rollout.release_memory": True}))
    weights = 2 * 8_030_261_248
    assert beside.needed_bytes == apart.needed_bytes + weights
    assert apart.servers is None and asleep.needed_bytes < beside.needed_bytes
    assert beside.left_for_kv_cache(80 * GIB) == 80 * GIB - beside.worst.peak_bytes - RESERVE_BYTES - weights


def test_warnings_name_what_is_unwise(make: Make) -> None:
    across = plan(make(LLAMA3_8B, {"parallel.tensor": 8, "slurm.gpus_per_node": 4}))
    assert any("across nodes" in warning for warning in across.warnings)
    idle = plan(make(LLAMA3_8B, {"parallel.pipeline": 4, "train.batch_size": 2}), gpus=4)
    assert any("stages idle" in warning for warning in idle.warnings)
    alone = plan(make(LLAMA3_8B, {"parallel.tensor": 8, "parallel.sequence": True}))
    assert alone.warnings == ()


@pytest.mark.parametrize(
    ("changes", "gpus", "message"),
    [
        ({"parallel.tensor": 2, "parallel.pipeline": 2}, 6, r"--gpus=6 must be a multiple of .* = 4"),
        ({"parallel.tensor": 3}, 3, "parallel.tensor=3 must divide num_attention_heads=32"),
        ({}, 3, "must be a multiple of the data-parallel size, 3"),
        ({"rollout.context_length": 9000}, 1, "max_position_embeddings=8192"),
        ({"fp8.recipe": "mxfp8", "fp8.params": True}, 1, "fp8.params=true cannot go with fp8.recipe=mxfp8"),
        ({"fp8.recipe": "tensorwise", "fp8.bf16_first_layers": 32}, 1, "leave none of num_hidden_layers=32"),
        ({"optimizer.overlap_param_gather": True}, 1, "must go with optimizer.overlap_grad_reduce=true"),
        (
            {"memory.recompute": "selective", "memory.recompute_modules": ("moe",)},
            1,
            "memory.recompute_modules=moe must go with a model that has experts",
        ),
        ({"memory.offload": ("reference",), "algorithm.kl_coef": 0.0}, 1, "memory.offload=reference must go with a KL"),
        ({"parallel.context": 2}, 2, "parallel.context=2 must go with train.micro_batch_tokens"),
        ({"parallel.context": 2, "train.micro_batch_tokens": 2048}, 3, r"--gpus=3 must .* parallel.context=2 = 2"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_the_setting(
    make: Make, changes: dict[str, Any], gpus: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(make(LLAMA3_8B, changes), gpus)


@pytest.fixture
def toml(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B))
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\npath = "{tmp_path}"\ndtype = "bfloat16"\n[slurm]\nrollout_nodes = 1\n')
    return str(path)


def test_the_command_prints_a_table_and_writes_json(
    toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "plan",
        toml,
        "--parallel.tensor=8",
        "--parallel.sequence=true",
        "--gpus",
        "16",
        f"--json={tmp_path}/p.json",
    ]
    assert command.run(words) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert "8,030,261,248 parameters on 16 GPUs, 8 a node: TP 8 x PP 1 x DP 2" in printed
    assert written["fits"] and written["stages"][0]["parameter_bytes"] >= 8_030_261_248 * 2 / 8
    assert f"{written['needed_bytes'] / GIB:.1f} GiB needed" in printed


def test_the_command_fails_where_it_does_not_fit_and_says_what_does(
    toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(["plan", toml, "--gpus=8", "--json", f"{tmp_path}/p.json"]) == 1
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert "does not fit: " in printed and "it fits with --parallel.tensor=" in printed
    assert written["suggestion"]["needed_bytes"] <= 80 * GIB


@pytest.mark.parametrize(
    "words", [["--gpus=0"], ["--gpus", "many"], ["--gpu-memory-gb=-1"], ["--json"], ["--nonsense"]]
)
def test_the_command_refuses_wrong_options(toml: str, words: list[str]) -> None:
    with pytest.raises(ConfigError):
        command.run(["plan", toml, *words])
