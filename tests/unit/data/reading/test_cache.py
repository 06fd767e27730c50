"""The cache: what was read is read once, damage is fetched again, the limit holds, a full disk does no harm."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.reading.cache import PIECE_BYTES, RangeCache

SIZE = 5 * PIECE_BYTES + 1234


class Store:
    """An object, and the ranges that were asked of it."""

    def __init__(self, size: int = SIZE) -> None:
        self.content = np.random.default_rng(0).bytes(size)
        self.asked: list[tuple[int, int]] = []

    def fetch(self, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        return self.content[start:stop]


def used(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("??/*"))


def test_ranges_come_back_and_are_fetched_once(tmp_path: Path) -> None:
    cache, store = RangeCache(str(tmp_path), 2**30), Store()
    for start, stop in [(0, 10), (PIECE_BYTES - 5, 3 * PIECE_BYTES + 7), (SIZE - 9, SIZE), (100, SIZE)]:
        assert cache.read("a", start, stop, SIZE, store.fetch) == store.content[start:stop]
    pieces = [(0, 1), (1, 4), (5, 6), (4, 5)]
    assert store.asked == [(first * PIECE_BYTES, min(last * PIECE_BYTES, SIZE)) for first, last in pieces]
    again = RangeCache(str(tmp_path), 2**30)
    assert again.read("a", 0, SIZE, SIZE, store.fetch) == store.content
    assert len(store.asked) == 4
    other = Store()
    other.content = bytes(SIZE)
    assert cache.read("b", 5, 9, SIZE, other.fetch) == bytes(4), "another object of the same place"


def test_a_damaged_piece_is_fetched_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, store = RangeCache(str(tmp_path), 2**30), Store()
    cache.read("a", 0, SIZE, SIZE, store.fetch)
    for number, file in enumerate(sorted(tmp_path.glob("??/*"))):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content[: len(content) // (1 + number % 2)]))
    assert cache.read("a", 0, SIZE, SIZE, store.fetch) == store.content
    assert "damaged; fetching it again" in caplog.text
    store.asked.clear()
    assert cache.read("a", 0, SIZE, SIZE, store.fetch) == store.content
    assert store.asked == []


def test_the_limit_holds_and_the_oldest_go_first(tmp_path: Path) -> None:
    limit = 8 * PIECE_BYTES
    cache, store = RangeCache(str(tmp_path), limit), Store(PIECE_BYTES)
    for i in range(7):
        cache.read(f"object {i}", 0, PIECE_BYTES, PIECE_BYTES, store.fetch)
    for age, i in enumerate([3, 0, 1, 2, 4, 5, 6]):
        path = cache._path(f"object {i}", 0)
        os.utime(path, (1000 + age, 1000 + age))
    for i in range(7, 30):
        cache.read(f"object {i}", 0, PIECE_BYTES, PIECE_BYTES, store.fetch)
        assert used(tmp_path) <= limit
        if i == 8:
            assert not cache._path("object 3", 0).exists()
            assert cache._path("object 6", 0).exists()
    assert used(tmp_path) > limit // 2
    big = Store(20 * PIECE_BYTES)
    assert cache.read("big", 0, 20 * PIECE_BYTES, 20 * PIECE_BYTES, big.fetch) == big.content, "passed by"
    assert used(tmp_path) <= limit


def test_room_promised_to_one_writer_is_not_given_to_another(tmp_path: Path) -> None:
    limit = 4 * PIECE_BYTES
    cache, store = RangeCache(str(tmp_path), limit), Store(PIECE_BYTES)
    cache._reserve({cache._path("slow", number): PIECE_BYTES for number in range(2)})  # and doesn't come to write
    for i in range(6):
        cache.read(f"object {i}", 0, PIECE_BYTES, PIECE_BYTES, store.fetch)
        assert used(tmp_path) <= limit


def test_many_readers_share_it(tmp_path: Path) -> None:
    limit, store, wrong = 4 * PIECE_BYTES, Store(), []

    def read(seed: int) -> None:
        cache, draw = RangeCache(str(tmp_path), limit), np.random.default_rng(seed)
        for _ in range(20):
            start, stop = sorted(draw.integers(0, SIZE, 2).tolist())
            if cache.read("a", start, stop + 1, SIZE, store.fetch) != store.content[start : stop + 1]:
                wrong.append((start, stop))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert used(tmp_path) <= limit


@pytest.mark.parametrize("missing", [1, PIECE_BYTES, 2 * PIECE_BYTES + 3])
def test_an_object_that_ends_early_is_not_kept_as_whole(tmp_path: Path, missing: int) -> None:
    cache, store = RangeCache(str(tmp_path), 2**30), Store()
    whole = store.content
    store.content = whole[:-missing]
    assert cache.read("a", 3, SIZE, SIZE, store.fetch) == whole[3 : SIZE - missing]
    store.content = whole
    assert cache.read("a", 3, SIZE, SIZE, store.fetch) == whole[3:]


def test_a_folder_that_cant_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    store: Store = Store()
    cache = RangeCache(str(tmp_path / "file"), 2**30)
    assert cache.read("a", 0, SIZE, SIZE, store.fetch) == store.content
    assert "doing without" in caplog.text
