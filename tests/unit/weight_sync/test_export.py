"""Buckets of bounded size, and bytes that SGLang's own class puts together again."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.model.export_hf import entries_of
from megatron_rpp.model.hf_io.safetensors_writer import Entry
from megatron_rpp.weight_sync.export import Bucket, fill_buckets, payload_bytes, plan_buckets, tensors_of
from tests.support.sglang_parts import tensor_bucket


def named(*sizes: int) -> list[tuple[str, Tensor]]:
    """uint8 tensors of these many bytes, each byte different from its neighbours."""
    return [(f"t{i}", (torch.arange(size) + 17 * i).to(torch.uint8)) for i, size in enumerate(sizes)]


def entries(tensors: list[tuple[str, Tensor]]) -> list[Entry]:
    return entries_of(iter(tensors))


def flat(bucket: Bucket) -> Tensor:
    (only,) = bucket.parts
    return only


def buckets(tensors: list[tuple[str, Tensor]], max_bytes: int) -> list[Bucket]:
    """Copies: a bucket is good until the next but one."""
    found = fill_buckets(iter(tensors), plan_buckets(entries(tensors), max_bytes), flatten=True)
    return [replace(bucket, parts=(flat(bucket).clone(),)) for bucket in found]


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "expected"),
    [
        ([3, 3, 3], 6, [["t0", "t1"], ["t2"]]),  # exactly full is allowed
        ([3, 3, 3], 5, [["t0"], ["t1"], ["t2"]]),
        ([1, 9, 1, 1], 4, [["t0"], ["t1"], ["t2", "t3"]]),  # one too large goes alone
        ([9, 1], 4, [["t0"], ["t1"]]),
        ([2, 2], 100, [["t0", "t1"]]),
        ([], 4, []),
    ],
)
def test_buckets_fill_up_in_order_and_a_large_tensor_goes_alone(
    sizes: list[int], max_bytes: int, expected: list[list[str]]
) -> None:
    assert [b.names for b in buckets(named(*sizes), max_bytes)] == expected


@given(sizes=st.lists(st.integers(1, 40), max_size=12), max_bytes=st.integers(1, 50))
def test_no_bucket_exceeds_the_bound_and_every_byte_is_sent_once(sizes: list[int], max_bytes: int) -> None:
    tensors = named(*sizes)
    found = buckets(tensors, max_bytes)
    assert all(flat(b).numel() <= max_bytes or len(b.names) == 1 for b in found)
    assert [n for b in found for n in b.names] == [name for name, _ in tensors]
    if tensors:
        assert torch.equal(torch.cat([flat(b) for b in found]), torch.cat([t for _, t in tensors]))


def test_a_bucket_is_yielded_before_later_tensors_are_made() -> None:
    """Weight sync streams: one bucket is filled while another is on its way, and not the model."""
    made = []

    def source():
        for name, tensor in named(2, 2, 2, 2):
            made.append(name)
            yield name, tensor

    next(fill_buckets(source(), plan_buckets(entries(named(2, 2, 2, 2)), 4), flatten=True))
    assert made == ["t0", "t1"]


def test_a_lone_tensor_is_sent_from_where_it_lies() -> None:
    (name, tensor), *_ = named(8)
    (bucket,) = fill_buckets(iter([(name, tensor)]), plan_buckets(entries([(name, tensor)]), 4), flatten=True)
    assert flat(bucket).data_ptr() == tensor.data_ptr()


def test_a_bucket_keeps_its_bytes_until_the_next_but_one_is_asked_for() -> None:
    """It is on its way while the next one is filled."""
    tensors = named(*[2] * 12)
    found = fill_buckets(iter(tensors), plan_buckets(entries(tensors), 4), flatten=True)
    last, expected = next(found), torch.cat([tensors[0][1], tensors[1][1]])
    for i, bucket in enumerate(found, start=1):
        assert torch.equal(flat(last), expected)
        last, expected = bucket, torch.cat([tensors[2 * i][1], tensors[2 * i + 1][1]])


def test_beside_an_outsize_tensor_no_other_bucket_is_made() -> None:
    assert [bucket.may_overlap for bucket in buckets(named(2, 2, 9, 1, 1), 4)] == [True, False, True]


class Chunk(torch.nn.Module):
    share_embeddings_and_output_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10))  # 40 bytes


@pytest.mark.parametrize(
    ("tp_size", "ep_size", "dtype", "flatten", "expected"),
    [
        (1, 1, None, False, 100),
        (1, 1, torch.float32, False, 100),
        (1, 1, torch.bfloat16, False, 60),
        (1, 1, None, True, 60),
        (2, 1, None, False, 60),
        (1, 2, None, False, 60),
    ],
    ids=["as held", "in its own dtype", "converted", "flat", "gathered over TP", "gathered over EP"],
)
def test_room_is_left_for_the_making_of_a_parameter_where_it_is_not_sent_as_it_is_held(
    tp_size: int, ep_size: int, dtype: torch.dtype | None, flatten: bool, expected: int
) -> None:
    parallel = SimpleNamespace(tp_size=tp_size, etp_size=1, ep_size=ep_size)
    model = SimpleNamespace(chunks=[Chunk()], parallel=parallel, config=SimpleNamespace(params_dtype=torch.float32))
    export: Any = SimpleNamespace(model=model, dtype=dtype)
    assert payload_bytes(export, 100, flatten=flatten) == expected


def test_a_tensor_that_was_not_planned_is_an_error_rather_than_shifted_bytes() -> None:
    with pytest.raises(AssertionError, match="t1 came in the place of t0"):
        list(fill_buckets(iter(named(2, 2)[1:]), plan_buckets(entries(named(2)), 4), flatten=True))
    with pytest.raises(AssertionError, match="more tensors than planned"):
        list(fill_buckets(iter(named(2, 2)), plan_buckets(entries(named(2)), 4), flatten=True))


def test_tensors_that_sglang_joins_travel_in_one_request() -> None:
    names = ("self_attn.q_a_proj.weight", "self_attn.q_b_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "rest")
    tensors = [(name, torch.zeros(4, dtype=torch.uint8)) for name in names]
    assert [bucket.names for bucket in buckets(tensors, 4)] == [list(names[:3]), ["rest"]]


def test_wider_dtypes_come_first_so_that_every_tensor_is_aligned() -> None:
    tensors = [("w", torch.zeros(3).to(torch.float8_e4m3fn)), ("scale", torch.ones(2)), ("b", torch.ones(1).bfloat16())]
    (bucket,) = buckets(tensors, 100)
    assert bucket.names == ["scale", "b", "w"]
    for name, found in tensors_of(bucket):
        assert found.equal(dict(tensors)[name]) or found.dtype == torch.float8_e4m3fn


def reassemble(bucket: Bucket) -> dict[str, Tensor]:
    found, start = {}, 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        kind = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        found[name] = flat(bucket)[start : start + size].clone().view(kind).reshape(shape)
        start += size
    assert start == flat(bucket).numel()
    return found


MIXED = [
    ("transposed", torch.randn(6, 4).t()),  # not contiguous
    ("half", torch.randn(3, 3).bfloat16()),
    ("strided", torch.randn(8)[::2]),
    ("scalar", torch.tensor(2.5)),
    ("nan", torch.tensor([float("nan"), float("-inf"), -0.0])),
    ("fp16", torch.randn(5).half()),
]


@pytest.mark.parametrize("max_bytes", [1, 40, 10_000])
def test_bytes_reassemble_bit_for_bit_with_mixed_dtypes(max_bytes: int) -> None:
    found = {name: t for bucket in buckets(MIXED, max_bytes) for name, t in reassemble(bucket).items()}
    assert found.keys() == {name for name, _ in MIXED}
    for name, original in MIXED:
        assert found[name].dtype == original.dtype and found[name].shape == original.shape
        expected = original.contiguous().flatten().view(torch.uint8)
        assert torch.equal(found[name].flatten().view(torch.uint8), expected), name


def receive(bucket: Bucket) -> dict[str, Tensor]:
    """What a server does with a broadcast bucket."""
    allocated = tensor_bucket().FlattenedTensorBucket.empty(bucket.names, bucket.dtypes, bucket.shapes, "cpu")
    allocated.flattened_tensor.copy_(flat(bucket))
    return dict(allocated.reconstruct_tensors())


def test_sglang_reads_the_same_tensors_out_of_a_bucket() -> None:
    sent = [("a", torch.randn(3, 5)), ("b", torch.randn(4, 2).t()), ("c", torch.randn(7))]
    (bucket,) = buckets(sent, 10_000)
    found = receive(bucket)
    assert all(torch.equal(found[name], tensor) for name, tensor in sent) and len(found) == 3


def test_sglang_reads_mixed_dtypes_out_of_a_bucket() -> None:
    sent = [("bf16", torch.randn(3).bfloat16()), ("fp32", torch.randn(2))]
    found = {k: v for bucket in buckets(sent, 10_000) for k, v in receive(bucket).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in sent)
