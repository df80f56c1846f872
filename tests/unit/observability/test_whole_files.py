"""Files that are replaced whole, while others write and read them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_rpp.observability.files import write_whole


def test_two_that_write_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    texts = [str(digit) * 200_000 for digit in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            list(pool.map(lambda text: write_whole(path, text), texts))
            assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "record.json"
    write_whole(path, "old", durable=durable)
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800", durable=durable)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
