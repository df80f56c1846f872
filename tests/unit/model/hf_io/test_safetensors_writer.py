"""Writing safetensors: other readers see the same bytes, files fill as planned, and failures leave nothing."""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megatron_rpp.model.hf_io import safetensors_writer
from megatron_rpp.model.hf_io.safetensors_reader import DTYPES, SafetensorsFile
from megatron_rpp.model.hf_io.safetensors_writer import (
    Entry,
    name_files,
    plan_files,
    split_entries,
    write_file,
    write_index,
)

F32 = torch.float32


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bytes that are a value of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    data = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return data.reshape(-1).view(dtype).reshape(shape)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def entries_of(tensors: dict[str, Tensor]) -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def require_readable(path: Path, tensors: dict[str, Tensor]) -> None:
    """By safetensors' two readers and by ours."""
    whole = load_file(path)
    ours = SafetensorsFile(path)
    assert whole.keys() == tensors.keys() == ours.tensors.keys()
    with safe_open(str(path), "pt") as f:
        assert f.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert same_bytes(whole[name], tensor) and same_bytes(f.get_tensor(name), tensor)
            assert same_bytes(ours.read(name), tensor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_every_dtype_is_read_back_by_safetensors(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"a": random_tensor(dtype, shape, 0), "b": random_tensor(dtype, (2, 2), 1)}
    write_file(tmp_path / "x.safetensors", entries_of(tensors), tensors.items())
    require_readable(tmp_path / "x.safetensors", tensors)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=30).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 99)),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tensors_are_read_back_by_safetensors(
    tmp_path: Path, drawn: dict[str, tuple[torch.dtype, list[int], int]]
) -> None:
    """Names of any text, and sizes that leave later tensors unaligned."""
    tensors = {name: random_tensor(dtype, tuple(shape), seed) for name, (dtype, shape, seed) in drawn.items()}
    write_file(tmp_path / "x.safetensors", entries_of(tensors), tensors.items())
    require_readable(tmp_path / "x.safetensors", tensors)


def test_views_are_written_as_their_values_and_parameters_without_their_graph(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.T, "slice": base[1:3, ::2], "p": torch.nn.Parameter(base), "wide": base[:1].expand(4, 6)}
    write_file(tmp_path / "x.safetensors", entries_of(tensors), tensors.items())
    require_readable(tmp_path / "x.safetensors", {name: tensor.detach() for name, tensor in tensors.items()})


def test_the_data_starts_aligned(tmp_path: Path) -> None:
    for length in range(1, 9):
        write_file(tmp_path / "x", [Entry("n" * length, F32, (1,))], [("n" * length, torch.ones(1))])
        assert int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") % 8 == 0


def test_a_tensor_is_written_and_let_go_before_the_next_is_made(tmp_path: Path) -> None:
    entries, written, events = [Entry(str(i), F32, (i,)) for i in range(4)], [], []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i in range(4):
            tensor = torch.ones(i)
            reference = weakref.ref(tensor)
            yield str(i), tensor
            del tensor
            events.append((reference() is None, list(written)))

    stream = tensors()
    write_file(tmp_path / "x", entries, stream, written.append)
    assert next(stream, None) is None and written == [0, 4, 8, 12]
    assert events == [(True, [0]), (True, [0, 4]), (True, [0, 4, 8]), (True, [0, 4, 8, 12])]


def test_one_iterator_feeds_several_files(tmp_path: Path) -> None:
    tensors = {str(i): torch.full((3,), float(i)) for i in range(5)}
    stream = iter(tensors.items())
    files = plan_files(entries_of(tensors), 24)
    for file, entries in files:
        write_file(tmp_path / file, entries, stream)
    assert next(stream, None) is None
    read = {name: tensor for file, _ in files for name, tensor in load_file(tmp_path / file).items()}
    assert read.keys() == tensors.keys() and all(same_bytes(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2, 1)), ("a", torch.ones(2).double())],
)
def test_a_tensor_that_was_not_planned_is_refused_and_leaves_no_file(tmp_path: Path, name: str, tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=r"x\.tmp: .* comes where .*name='a'.* was planned"):
        write_file(tmp_path / "x", [Entry("a", F32, (2,))], [(name, tensor)])
    assert not list(tmp_path.iterdir())


def test_too_few_tensors_are_refused_by_the_name_of_the_first_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the tensors end before b"):
        write_file(tmp_path / "x", [Entry("a", F32, (2,)), Entry("b", F32, (2,))], [("a", torch.ones(2))])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([Entry("a", F32, ()), Entry("a", F32, ())], "a cannot be a tensor's name"),
        ([Entry("__metadata__", F32, ())], "__metadata__ cannot be a tensor's name"),
        ([Entry("a", torch.complex128, ())], r"a: safetensors cannot hold torch\.complex128"),
    ],
)
def test_entries_that_the_format_cannot_hold_are_refused(tmp_path: Path, entries: list[Entry], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        write_file(tmp_path / "x", entries, [])
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_older_file_and_the_rest_of_the_iterator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: the error names the file, and the collective behind the iterator can be finished."""
    path, stream = tmp_path / "x", iter([("a", torch.ones(2)), ("b", torch.ones(2)), ("c", torch.ones(2))])
    path.write_text("older")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_writer.os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}\.tmp'") as caught:
        write_file(path, [Entry("a", F32, (2,)), Entry("b", F32, (2,))], stream)
    assert caught.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == ["x"] and path.read_text() == "older"
    assert next(stream)[0] == "c"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a Linux device")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    os.symlink("/dev/full", tmp_path / "x.tmp")
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/x\.tmp'"):
        write_file(tmp_path / "x", [Entry("a", F32, (1000,))], [("a", torch.ones(1000))])
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_tensors_own_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        raise OSError(errno.ECONNRESET, "a peer left")
        yield "a", torch.ones(2)

    with pytest.raises(OSError, match=r"a peer left$"):
        write_file(tmp_path / "x", [Entry("a", F32, (2,))], tensors())
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/no/x\.tmp"):
        write_file(tmp_path / "no" / "x", [], [])


def test_files_are_filled_in_order_and_a_large_tensor_has_its_own() -> None:
    entries = [Entry(name, F32, (count,)) for name, count in [("a", 1), ("b", 2), ("c", 9), ("d", 1), ("e", 2)]]
    assert [(file, [e.name for e in held]) for file, held in plan_files(entries, 12)] == [
        ("model-00001-of-00003.safetensors", ["a", "b"]),
        ("model-00002-of-00003.safetensors", ["c"]),
        ("model-00003-of-00003.safetensors", ["d", "e"]),
    ]


def test_a_model_that_fits_is_one_file_without_a_number_or_an_index(tmp_path: Path) -> None:
    files = plan_files([Entry("a", F32, (2,)), Entry("b", F32, ())], 12)
    write_index(tmp_path, files)
    assert [file for file, _ in files] == ["model.safetensors"] and not list(tmp_path.iterdir())


@given(st.lists(st.integers(0, 20)), st.integers(1, 100))
def test_runs_are_as_long_as_they_may_be(counts: list[int], max_bytes: int) -> None:
    entries = [Entry(str(i), F32, (count,)) for i, count in enumerate(counts)]
    runs = split_entries(entries, max_bytes)
    sizes = [sum(entry.nbytes for entry in run) for run in runs]
    assert [entry for run in runs for entry in run] == entries
    assert all(
        size <= max_bytes or len([e for e in run if e.nbytes]) == 1 for size, run in zip(sizes, runs, strict=True)
    )
    assert all(size + after[0].nbytes > max_bytes for size, after in zip(sizes, runs[1:], strict=False))


def test_runs_of_several_writers_are_named_together() -> None:
    names = [file for file, _ in name_files([[Entry("a", F32, ())], [Entry("b", F32, ())]])]
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_size_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes=0 must be positive"):
        plan_files([], 0)


def test_the_index_gives_each_tensor_its_file_and_the_total(tmp_path: Path) -> None:
    write_index(tmp_path, plan_files([Entry("a", F32, (3,)), Entry("b", torch.bfloat16, (2,))], 12))
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 16},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
