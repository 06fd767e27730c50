"""The loader: equal global batches for all worlds and workers, exact resume, named faults, clean ends."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from launch.s3_server import S3Server, find_rclone
from pipeline.data.batch import Batch, Example, RawSample, derive_seed
from pipeline.data.images.transforms import EvalImage, ImageExample, TrainImage
from pipeline.data.loader import Cursor, Loader, Step
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.reading.worker import WorkerDied
from pipeline.errors import ConfigError, DataError
from tests.support.loaders import loader_of, swept

TRAIN = ImageExample(TrainImage((16, 16)), label=True)


class Misbehaving:
    """A transform that does as the sample's number says."""

    def __init__(self, number: int, deed: str) -> None:
        self.number = number
        self.deed = deed

    def __call__(self, sample: RawSample, seed: int) -> Example:
        if sample.id == self.number:
            if self.deed == "raise":
                raise ZeroDivisionError("a defect")
            os.kill(os.getpid(), signal.SIGKILL)
        return Example(label=sample.id)

    def blank(self) -> Example:
        return Example(label=-1)


def settings(**changes: object) -> dict:
    return {"seed": 3, "global_batch": 12, "rank": 0, "world_size": 1, "block": 8, "lanes": 4, "window": 16} | changes


def take(loader: Loader, start: Cursor, count: int) -> list[Step]:
    with loader:
        return list(itertools.islice(loader.steps(start), count))


def global_batches(manifest: Manifest, start: Cursor, count: int, world: int, workers: int, micro: int | None = None):
    """Each global batch as one, put together from all ranks and micro batches."""
    shares = []
    for rank in range(world):
        loader = loader_of(manifest, TRAIN, **settings(rank=rank, world_size=world, workers=workers, micro_batch=micro))
        shares.append(take(loader, start, count))
    return [[batch for step in steps for batch in step.micro] for steps in zip(*shares, strict=True)]


def content(micro: list[Batch]) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([getattr(batch, name) for batch in micro])
        for name in ("ids", "seeds", "weight", "images", "labels")
    }


@pytest.fixture(scope="module")
def expected(ninety: Manifest) -> list[dict[str, torch.Tensor]]:
    """Ten global batches, over the end of the first epoch."""
    return [content(batch) for batch in global_batches(ninety, Cursor(), 10, world=1, workers=0)]


@pytest.mark.parametrize(
    ("world", "workers"),
    [
        *((2, 0), (3, 0), (4, 0), (1, 2)),
        *(
            pytest.param(world, workers, marks=pytest.mark.slow)
            for world, workers in [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2)]
        ),
    ],
)
def test_global_batches_are_equal_for_all_worlds_and_workers(ninety, expected, world: int, workers: int) -> None:
    for batch, right in zip(global_batches(ninety, Cursor(), 10, world, workers, micro=2), expected, strict=True):
        for name, tensor in content(batch).items():
            assert torch.equal(tensor, right[name]), name


def test_an_epoch_has_each_sample_once_and_the_next_follows_without_a_gap(expected) -> None:
    epoch_of_seed = {derive_seed(3, epoch, i): (epoch, i) for epoch in range(2) for i in range(90)}
    drawn = [epoch_of_seed[seed] for batch in expected for seed in batch["seeds"].tolist()]
    assert [i for _, i in drawn] == [i for batch in expected for i in batch["ids"].tolist()]
    assert sorted(i for epoch, i in drawn if epoch == 0) == list(range(90))
    assert [epoch for epoch, _ in drawn].count(1) == 30
    assert {epoch for epoch, _ in drawn[84:96]} == {0, 1}, "one batch spans both"


def test_unreadable_samples_keep_their_slot_with_weight_0(expected) -> None:
    ids = torch.cat([batch["ids"] for batch in expected])
    weight = torch.cat([batch["weight"] for batch in expected])
    assert set(ids[weight == 0].tolist()) == {17, 60}
    assert all(batch["images"].shape == (12, 3, 16, 16) for batch in expected)


def test_labels_and_seeds_belong_to_their_samples(expected) -> None:
    batch = expected[0]
    present = batch["weight"] > 0
    assert torch.equal(batch["labels"][present], batch["ids"][present] % 7)
    assert batch["seeds"].tolist() == [derive_seed(3, 0, i) for i in batch["ids"].tolist()]


@pytest.mark.parametrize("steps_before", [1, 7, 8])
def test_resuming_goes_on_exactly(ninety, expected, steps_before: int) -> None:
    """Another world size takes over, in the middle of an epoch and beyond its end."""
    [*_, last] = take(loader_of(ninety, TRAIN, **settings()), Cursor(), steps_before)
    resumed = global_batches(ninety, last.after, 10 - steps_before, world=2, workers=0)
    for batch, right in zip(resumed, expected[steps_before:], strict=True):
        assert torch.equal(content(batch)["images"], right["images"])
        assert torch.equal(content(batch)["seeds"], right["seeds"])


def test_cursor_and_position_count_samples(ninety: Manifest) -> None:
    steps = take(loader_of(ninety, TRAIN, **settings(micro_batch=5)), Cursor(2, 80), 2)
    assert [step.after for step in steps] == [Cursor(3, 2), Cursor(3, 14)]
    assert [[batch.position for batch in step.micro] for step in steps] == [[260] * 3, [272] * 3]
    assert [[len(batch) for batch in step.micro] for step in steps] == [[5, 5, 2]] * 2
    assert all(step.wait_s >= 0 for step in steps)


def test_augmentation_differs_between_epochs(ninety: Manifest) -> None:
    def image_of(cursor: Cursor) -> torch.Tensor:
        for step in take(loader_of(ninety, TRAIN, **settings()), cursor, 8):
            for batch in step.micro:
                if 5 in batch.ids.tolist():
                    assert batch.images is not None
                    return batch.images[batch.ids.tolist().index(5)]
        raise AssertionError("not in these batches")

    assert not torch.equal(image_of(Cursor(0, 0)), image_of(Cursor(1, 0)))
    assert torch.equal(image_of(Cursor(1, 0)), image_of(Cursor(1, 0)))


def test_faults_are_named(ninety: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        take(loader_of(ninety, TRAIN, **settings()), Cursor(), 16)
    messages = sorted(record.message for record in caplog.records)
    assert len(messages) == 2, "each is named once"
    assert f"'000017' of {ninety.url}/00000.tar (id 17): bytes that are no image" in messages[0]
    assert f"number 5 of {ninety.url}/00002.tar (id 60): damaged tar header (checksum)" in messages[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_faults_end_the_run(data_set: Callable[..., Manifest], workers: int) -> None:
    shards = [[(f"{i:03d}", {"jpg": b"nonsense", "cls": b"1"}) for i in range(40)]]
    loader = loader_of(data_set(shards=shards), TRAIN, **settings(workers=workers))
    with pytest.raises(DataError, match=r"unreadable, over the limit of 1.00%; the last: '0\d\d' of .*/00000.tar"):
        take(loader, Cursor(), 100)
    tolerant = loader_of(data_set(shards=shards), TRAIN, **settings(max_unreadable=1.0))
    assert all(step.micro[0].weight.sum() == 0 for step in take(tolerant, Cursor(), 100))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_lost_shard_costs_its_samples_only(data_set: Callable[..., Manifest], damage: str) -> None:
    manifest = data_set([20, 20])
    tar = Path(manifest.url) / "00001.tar"
    if damage == "missing":
        tar.unlink()
    else:
        tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    batches = list(swept(manifest, TRAIN, rank=0, world_size=1, batch=16))
    read = {int(i) for batch in batches for i, w in zip(batch.ids, batch.weight, strict=True) if w > 0}
    assert set(range(20)) <= read
    assert len(read) == 20 if damage == "missing" else 25 < len(read) < 35


def test_a_damaged_index_is_named(data_set: Callable[..., Manifest]) -> None:
    manifest = data_set([20])
    index = Path(manifest.url) / "00000.index.npy"
    index.write_bytes(index.read_bytes()[:-8] + bytes(8))
    with pytest.raises(DataError, match="isn't the one the manifest knows"):
        take(loader_of(manifest, TRAIN, **settings()), Cursor(), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 5}, r"5 ranks don't divide a global batch of 12.*run on 2, 3, 4, 6, 12 ranks"),
        ({"lanes": 7}, r"7 lanes don't divide a global batch of 12.*set data.lanes to 3, 4, 6, 12"),
    ],
)
def test_numbers_that_dont_divide_are_refused(ninety: Manifest, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader_of(ninety, TRAIN, **settings(**changes))


@pytest.mark.parametrize(("sizes", "message"), [([10], "10 samples don't fill"), ([0], "data set that isn't empty")])
def test_too_few_samples_are_refused(data_set: Callable[..., Manifest], sizes: list[int], message: str) -> None:
    manifest = data_set(sizes)
    with pytest.raises(DataError, match=message):
        loader_of(manifest, TRAIN, **settings())
    if sizes == [0]:
        with pytest.raises(DataError, match="no samples"):
            swept(manifest, TRAIN, rank=0, world_size=1, batch=4)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """After the test no thread and no child process of the loader's is there."""
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before
    assert [t.name for t in threading.enumerate() if t.name.startswith(("loader", "shards"))] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_ends_iteration_threads_and_processes(ninety: Manifest, nothing_left: None, workers: int) -> None:
    loader = loader_of(ninety, TRAIN, **settings(workers=workers))
    steps = loader.steps(Cursor())
    next(steps)
    loader.close()
    assert list(steps) == []
    loader.steps(Cursor())  # never iterated
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_leaving_a_sweep_early_ends_it(ninety: Manifest, nothing_left: None, workers: int) -> None:
    swept(ninety, TRAIN, rank=0, world_size=1, batch=4, workers=workers)  # never begun
    batches = swept(ninety, TRAIN, rank=0, world_size=1, batch=4, workers=workers)
    next(batches)
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_in_a_transform_reaches_the_caller(ninety: Manifest, nothing_left: None, workers: int) -> None:
    loader = loader_of(ninety, Misbehaving(33, "raise"), **settings(workers=workers))
    with pytest.raises(ZeroDivisionError, match="a defect") as caught:
        take(loader, Cursor(), 8)
    assert any(f"sample 33 ('000033' of {ninety.url}/00001.tar)" in note for note in caught.value.__notes__)


def test_a_killed_worker_reaches_the_caller(ninety: Manifest, nothing_left: None) -> None:
    loader = loader_of(ninety, Misbehaving(33, "kill"), **settings(workers=2))
    with pytest.raises(WorkerDied, match="status -9"):
        take(loader, Cursor(), 8)


def test_workers_end_when_the_training_process_is_killed(ninety: Manifest) -> None:
    program = (
        "import os, signal, sys\n"
        "from pipeline.data.loader import Cursor\n"
        "from tests.support.loaders import loader_of\n"
        "from pipeline.data.manifest import read_manifest\n"
        "from pipeline.data.images.transforms import EvalImage, ImageExample\n"
        "transform = ImageExample(EvalImage((16, 16)))\n"
        "options = dict(seed=0, global_batch=4, rank=0, world_size=1, lanes=4, workers=2)\n"
        "loader = loader_of(read_manifest(sys.argv[1]), transform, **options)\n"
        "next(loader.steps(Cursor()))\n"
        "print(*[w.pid for w in loader._run.workers], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", program, ninety.url], capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    workers = [int(pid) for pid in result.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its training process"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("world", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_a_sweep_sees_each_sample_once(ninety: Manifest, world: int, workers: int) -> None:
    transform = ImageExample(EvalImage((16, 16)), label=True)
    ranks = [
        list(swept(ninety, transform, rank=rank, world_size=world, batch=16, workers=workers)) for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(batch) for batches in ranks for batch in batches}) == 1
    ids = torch.cat([batch.ids for batches in ranks for batch in batches])
    weight = torch.cat([batch.weight for batches in ranks for batch in batches])
    assert sorted(ids[ids >= 0].tolist()) == list(range(90))
    assert set(ids[weight == 0].tolist()) <= {-1, 17, 60}
    assert weight[ids == -1].sum() == 0
    assert ranks[0][0].ids.tolist() == list(range(len(ranks[0][0])))


def test_a_sweep_over_fewer_samples_than_ranks(data_set: Callable[..., Manifest]) -> None:
    manifest = data_set([2])
    ranks = [list(swept(manifest, TRAIN, rank=rank, world_size=4, batch=16)) for rank in range(4)]
    assert [[batch.ids.tolist() for batch in batches] for batches in ranks] == [[[0]], [[1]], [[-1]], [[-1]]]


@pytest.fixture
def ninety_on_s3(ninety: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manifest]:
    """The data set of 90 samples, served by a real S3 server."""
    if find_rclone() is None:
        pytest.skip("rclone has no wheel for this machine")
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        shutil.copytree(ninety.url, tmp_path / "s3" / "data-sets" / "ninety")
        yield read_manifest("s3://data-sets/ninety")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_from_s3_are_the_same(ninety_on_s3: Manifest, expected, nothing_left: None, workers: int) -> None:
    for batch, right in zip(global_batches(ninety_on_s3, Cursor(), 10, 1, workers), expected, strict=True):
        for name, tensor in content(batch).items():
            assert torch.equal(tensor, right[name]), name
