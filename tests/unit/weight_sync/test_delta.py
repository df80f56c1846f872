"""Changes reach the merged and cut parameters of a model whose layout only its loaders know."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_rpp.rollout.in_server import delta_loader
from megatron_rpp.rollout.in_server.delta_loader import BLOB, MANIFEST, DeltaError
from megatron_rpp.rollout.in_server.partial_tensor import PartialTensor
from megatron_rpp.weight_sync.delta import DeltaBucket, DeltaEncoder, failures, forget_failures, payload

Named = dict[str, Tensor]
TP, RANK = 2, 1  # the server rank that the loaders below play

# What SGLang's loaders do, each in its own words: (HF tensor) -> writes into the server's parameter.
Loader = Callable[[Tensor, Tensor], object]


def merged_rows(first: int, rows: int) -> Loader:
    """A projection's share of qkv_proj or gate_up_proj: this rank's rows of it, at `first`."""
    return lambda param, loaded: param.data.narrow(0, first, rows).copy_(loaded.narrow(0, RANK * rows, rows))


def row_parallel(param: Tensor, loaded: Tensor) -> None:
    columns = param.shape[1]
    param.data.copy_(loaded[:, RANK * columns : (RANK + 1) * columns])


def chunked_flat(param: Tensor, loaded: Tensor) -> None:
    param.data.copy_(loaded.reshape(-1).chunk(TP)[RANK].view_as(param).to("cpu"))


def split_in_three(param: Tensor, loaded: Tensor) -> None:
    for index, piece in enumerate(loaded.split([4, 2, 2], dim=0)):
        param[2 * index : 2 * index + 2].data.copy_(piece[:2].contiguous())


def transposed_expert(param: Tensor, loaded: Tensor) -> None:
    param.data[RANK].copy_(loaded.t().contiguous())


def expert_by_assignment(param: Tensor, loaded: Tensor) -> None:
    param.data[0] = loaded.transpose(-2, -1)


def padded_vocabulary(param: Tensor, loaded: Tensor) -> None:
    rows = loaded.narrow(0, 4, loaded.shape[0] - 4)
    param[: rows.shape[0]].data.copy_(rows)
    param[rows.shape[0] :].data.fill_(0)


def padded_by_cat(param: Tensor, loaded: Tensor) -> None:
    missing = torch.zeros(param.shape[0] - loaded.shape[0], *loaded.shape[1:], dtype=loaded.dtype)
    param.data.copy_(torch.cat([loaded, missing]))


def default(param: Tensor, loaded: Tensor) -> None:
    if param.numel() == 1 and loaded.numel() == 1:
        param.data.fill_(loaded.item())
    else:
        assert param.size() == loaded.size()
        param.data.copy_(loaded)


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Loader]] = {
    "merged_rows": ((8, 6), (10, 6), merged_rows(3, 4)),
    "row_parallel": ((5, 8), (5, 4), row_parallel),
    "chunked_flat": ((4, 6), (12,), chunked_flat),
    "split_in_three": ((8, 3), (6, 3), split_in_three),
    "transposed_expert": ((4, 6), (3, 6, 4), transposed_expert),
    "expert_by_assignment": ((4, 6), (3, 6, 4), expert_by_assignment),
    "padded_vocabulary": ((7, 3), (6, 3), padded_vocabulary),
    "padded_by_cat": ((7, 3), (9, 3), padded_by_cat),
    "default": ((9,), (9,), default),
    "scalar": ((1,), (1,), default),
}


class Server(nn.Module):
    """One rank of a server, with one parameter for each case."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        for name, (_, shape, _) in CASES.items():
            parameter = nn.Parameter(torch.full(shape, 3.0).to(dtype), requires_grad=False)
            self.register_parameter(name, parameter)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, loaded in weights:
            CASES[name][2](self.get_parameter(name), loaded)

    def bits(self) -> dict[str, list[int]]:
        return {name: p.data.contiguous().view(torch.uint8).flatten().tolist() for name, p in self.named_parameters()}


def trainer_weights(seed: int, dtype: torch.dtype = torch.bfloat16) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, _, _) in CASES.items()}


def moved(weights: Named, share: float, seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(t.shape, generator=generator) < share, -t.float(), t.float()).to(t.dtype)
        for name, t in weights.items()
    }


@pytest.fixture(autouse=True)
def only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server of one TP rank; tests/integration/test_delta.py has one of two."""
    monkeypatch.setattr(delta_loader, "tensor_parallel_group", lambda: None)
    monkeypatch.setattr(delta_loader, "shared", lambda named, *_: named)


def received(bucket: DeltaBucket, tp_size: int = 1) -> list[tuple[str, Tensor]]:
    """What a server's rank unpickles."""
    entries = payload(bucket, tp_size)["serialized_named_tensors"]
    assert isinstance(entries, list) and len(entries) == tp_size
    named: list[tuple[str, Tensor]] = pickle.loads(base64.b64decode(entries[0]))
    return named


def sync(encoder: DeltaEncoder, server: nn.Module, weights: Named, max_bytes: int = 10_000) -> list[DeltaBucket]:
    buckets = list(encoder.encode(weights.items(), max_bytes))
    for bucket in buckets:
        delta_loader.load(server, received(bucket))
    return buckets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_a_delta_leaves_the_server_as_a_full_load_would(dtype: torch.dtype, share: float) -> None:
    old, server, fresh, encoder = trainer_weights(1, dtype), Server(dtype), Server(dtype), DeltaEncoder()
    new = moved(old, share, seed=2)
    sync(encoder, server, old)
    sync(encoder, server, new)
    for loaded in (old, new):  # the same two loads: what neither writes stays as it was made
        fresh.load_weights(loaded.items())
    assert server.bits() == fresh.bits()


@pytest.mark.parametrize("name", [name for name in CASES if name != "scalar"])
def test_values_that_were_not_sent_stay_what_they_are_on_the_server(name: str) -> None:
    """So the loader does write changes alone; else the server would need the rest, which is not sent."""
    shape, _, loader = CASES[name]
    server = Server()
    before = server.bits()[name]
    nothing = PartialTensor(torch.full(shape, 9.0).bfloat16(), torch.zeros(shape, dtype=torch.bool))
    loader(server.get_parameter(name), nothing)
    after = server.bits()[name]
    zeroed = {"padded_vocabulary": 2 * 3 * 3, "padded_by_cat": 2 * 2 * 3}.get(name, 0)  # bytes of padding
    assert after[: len(after) - zeroed] == before[: len(before) - zeroed]
    assert not any(after[len(after) - zeroed :])


def test_a_parameter_of_another_dtype_gets_converted_changes() -> None:
    """Routers and selection biases are kept in float32 on servers."""
    target = torch.full((3,), 0.1)
    source = PartialTensor(torch.tensor([1.5, 2.5, 0.0]).bfloat16(), torch.tensor([False, True, False]))
    target.copy_(source)
    assert target.tolist() == pytest.approx([0.1, 2.5, 0.1])


USES: list[Callable[[Tensor], object]] = [
    lambda t: t + 1,
    lambda t: t.sum(),
    lambda t: t.view(torch.int16),
    lambda t: t[0].item(),
    lambda t: t.fill_(0),
    lambda t: torch.zeros(4).mul_(t),
    lambda t: torch.allclose(t, t),
    lambda t: t.as_strided((2,), (1,)),
    lambda t: t[torch.tensor([0, 1])],
    lambda t: t.copy_(torch.zeros(4)),
]


@pytest.mark.parametrize("index", range(len(USES)))
def test_a_use_that_needs_the_values_that_were_not_sent_raises(index: int) -> None:
    partial = PartialTensor(torch.zeros(4).bfloat16(), torch.tensor([False, True, True, True]))
    with pytest.raises(NotImplementedError):
        USES[index](partial)


def test_what_cannot_be_loaded_raises_with_the_name_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, server, old = DeltaEncoder(), Server(), trainer_weights(1)
    sync(encoder, server, old)
    (bucket,) = encoder.encode(moved(old, 0.1, 3).items(), 10_000)
    monkeypatch.setitem(CASES, "row_parallel", (*CASES["row_parallel"][:2], lambda param, t: param.copy_(t * 2)))
    with pytest.raises(DeltaError, match=r"row_parallel: NotImplementedError: aten.mul"):
        delta_loader.load(server, received(bucket))


def checksums(server: nn.Module) -> list[dict[str, object]]:
    """As `/weights_checker` answers when everything with a dot in its name is skipped."""
    return [{"checksums": {name: "0" for name, _ in server.named_buffers()}}]


def test_a_failure_is_told_and_not_raised_and_ends_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang dies of an exception in a custom loader."""
    encoder, server, old = DeltaEncoder(), Server(), trainer_weights(1)
    sync(encoder, server, old)
    assert failures(checksums(server)) == []
    buckets = list(encoder.encode(moved(old, 1.0, 3).items(), 1))
    with monkeypatch.context() as patch:
        patch.setitem(CASES, "row_parallel", (*CASES["row_parallel"][:2], lambda param, t: param.copy_(t[:, :3])))
        for bucket in buckets:
            delta_loader.apply(server, received(bucket))
    (told,) = failures(checksums(server))
    assert "server rank 0: DeltaError: row_parallel: RuntimeError" in told
    unloaded = server.bits()["default"]
    delta_loader.apply(server, received(buckets[-1]))
    assert server.bits()["default"] == unloaded and len(failures(checksums(server))) == 1


def test_the_next_attempt_starts_without_the_failures_of_the_last() -> None:
    encoder, server, old = DeltaEncoder(), Server(), trainer_weights(1)
    delta_loader.apply(server, [("model.weight", torch.zeros(3))])
    assert "rpp_delta_manifest" in failures(checksums(server))[0]
    for bucket in encoder.encode(old.items(), 10_000):
        delta_loader.apply(server, received(bucket))
    assert failures(checksums(server)) == []


def test_failures_can_be_forgotten_without_a_new_attempt() -> None:
    """Another transport follows, and its verification must not find a tensor that no model has."""
    server = Server()
    delta_loader.apply(server, [])
    entries = forget_failures(2)["serialized_named_tensors"]
    assert failures(checksums(server)) and isinstance(entries, list) and len(entries) == 2
    before = server.bits()
    delta_loader.apply(server, pickle.loads(base64.b64decode(entries[0])))
    assert failures(checksums(server)) == [] and server.bits() == before


def test_a_manifest_that_does_not_fit_its_bytes_is_refused() -> None:
    (bucket,) = DeltaEncoder().encode([("default", torch.zeros(9).bfloat16())], 100)
    named = dict(received(bucket))
    with pytest.raises(DeltaError, match="default"):
        delta_loader.load(Server(), [(MANIFEST, named[MANIFEST]), (BLOB, named[BLOB][:-8])])


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    max_bytes=st.integers(1, 120),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_buckets_are_bounded_and_hold_each_changed_tensor_once(sizes: list[int], max_bytes: int, share: float) -> None:
    encoder = DeltaEncoder()
    old = {f"t{i}": torch.arange(1.0, size + 1) for i, size in enumerate(sizes)}
    list(encoder.encode(old.items(), max_bytes))
    new = moved(old, share, seed=len(sizes))
    buckets = list(encoder.encode(new.items(), max_bytes))
    assert [name for b in buckets for name in b.names] == [n for n in old if not torch.equal(old[n], new[n])]
    assert all(b.dense_bytes <= max_bytes or len(b.names) == 1 for b in buckets)
    assert [b.is_first for b in buckets] == [i == 0 for i in range(len(buckets))]


def test_a_bucket_is_yielded_before_later_tensors_are_gathered() -> None:
    made: list[int] = []

    def source() -> Iterator[tuple[str, Tensor]]:
        for i in range(4):
            made.append(i)
            yield f"t{i}", torch.ones(4)

    next(DeltaEncoder().encode(source(), 16))
    assert made == [0, 1]


def test_the_base_is_a_copy_of_what_was_sent() -> None:
    """Else an optimizer step in place would move the base along, and nothing would seem to change."""
    weights = {"default": torch.zeros(9)}
    encoder = DeltaEncoder()
    list(encoder.encode(weights.items(), 100))
    weights["default"][4] = 1
    (bucket,) = encoder.encode(weights.items(), 100)
    assert bucket.names == ["default"]


def kinds(encoder: DeltaEncoder, weights: Named) -> str:
    """`whole` or `change`, of the one bucket."""
    ((_, blob), (_, _)) = received(next(iter(encoder.encode(weights.items(), 10**6))))[::-1]
    return "whole" if blob.numel() >= sum(t.nbytes for t in weights.values()) else "change"


def test_everything_is_sent_to_servers_that_may_not_hold_the_base() -> None:
    weights = {"a": torch.arange(1000.0)}
    encoder = DeltaEncoder()
    assert kinds(encoder, weights) == "whole"
    weights["a"][3] = -1
    assert kinds(encoder, weights) == "change"
    encoder.forget()
    weights["a"][3] = -2
    assert kinds(encoder, weights) == "whole"


def test_a_full_sync_by_another_transport_is_a_base() -> None:
    encoder, weights = DeltaEncoder(), {"a": torch.arange(1000.0)}
    encoder.remember("a", weights["a"])
    weights["a"][3] = -1
    assert kinds(encoder, weights) == "change"


def test_a_tensor_of_a_new_shape_is_sent_whole() -> None:
    encoder = DeltaEncoder()
    encoder.remember("a", torch.zeros(1000))
    assert kinds(encoder, {"a": torch.zeros(10, 100)}) == "whole"


def test_the_size_on_the_wire_is_counted_with_base64_and_does_not_grow_with_a_server_s_ranks() -> None:
    (bucket,) = DeltaEncoder().encode([("a", torch.zeros(3000))], 10**6)
    entries = payload(bucket, 4)["serialized_named_tensors"]
    assert isinstance(entries, list) and len(entries) == 4 and len(entries[0]) == bucket.wire_bytes > 12_000 * 4 / 3
    assert [pickle.loads(base64.b64decode(entry)) for entry in entries[1:]] == [[]] * 3


def test_one_step_at_the_papers_learning_rate_sends_less_than_two_fifths_in_bfloat16() -> None:
    """Adam's first step moves every weight by the learning rate: the most that one can change."""
    torch.manual_seed(0)
    weights = {f"{i}.weight": torch.nn.Parameter(0.02 * torch.randn(256, 384)) for i in range(4)}
    optimizer, encoder = torch.optim.AdamW(weights.values(), lr=5e-7), DeltaEncoder()
    for name, weight in weights.items():
        encoder.remember(name, weight.bfloat16())
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    new = {name: weight.detach().bfloat16() for name, weight in weights.items()}
    sent = sum(bucket.wire_bytes for bucket in encoder.encode(new.items(), 2**18))
    assert 0 < sent < 0.4 * sum(weight.nbytes for weight in new.values())


MLA = "model.layers.{}.self_attn.{}.weight"


def test_projections_that_sglang_joins_travel_together() -> None:
    """Its DeepSeek loader drops q_a_proj where kv_a_proj_with_mqa is not in the same request."""
    leaves = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    weights = {MLA.format(i, leaf): torch.ones(4) for i in range(3) for leaf in leaves}
    encoder = DeltaEncoder()
    list(encoder.encode(weights.items(), 10**6))
    for step, max_bytes in enumerate((1, 16, 33, 50, 1000)):
        for leaf in ("q_a_proj", "q_b_proj"):
            weights[MLA.format(1, leaf)][1] = 7 + step  # kv_a_proj_with_mqa does not change
        buckets = list(encoder.encode(weights.items(), max_bytes))
        together = [b.names for b in buckets if MLA.format(1, "q_a_proj") in b.names]
        assert len(together) == 1 and MLA.format(1, "kv_a_proj_with_mqa") in together[0]
        names = [n for b in buckets for n in b.names]
        assert sorted(names) == sorted({*names, MLA.format(1, "q_b_proj")})
