"""Equal global batches for all worlds and workers, with corrupt samples, epoch tails, kills, mixtures and copies."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pipeline.data.batch import derive_seed
from pipeline.data.images.transforms import ImageExample, TrainImage
from pipeline.data.loader import Cursor
from pipeline.data.manifest import Manifest
from pipeline.data.order.mixture import Data, TrainingSource, sources_of
from pipeline.data.order.tasks import OrderOptions, TrainPlan
from pipeline.data.reading.background import even_parts
from pipeline.data.reading.examples import Listed, WorkerSetup, produce
from pipeline.data.reading.takedown import Takedown, takedown_of
from tests.support.loaders import loader_of

TRAIN = ImageExample(TrainImage((16, 16)), label=True)
GLOBAL_BATCH, NUM_STEPS = 24, 9  # twice over the border of the epochs of 90 samples
WORLDS, WORKERS = (1, 2, 3, 4), (0, 1, 2, 4)


class Slot(NamedTuple):
    """What a slot of a global batch holds."""

    id: int
    weight: float
    seed: int
    pixels: bytes


def plan_of(data: Data, start: Cursor, rank: int, world: int, copies: int = 1) -> TrainPlan:
    share = GLOBAL_BATCH // world
    order = OrderOptions(3, GLOBAL_BATCH, block=8, lanes=4, window=16, copies=copies)
    return TrainPlan(sources_of(data), order, start, rank * share, (rank + 1) * share)


def global_batches(
    data: Data, world: int, workers: int, copies: int = 1, takedown: Takedown | None = None
) -> list[list[Slot]]:
    """All slots of each global batch, made as every worker of every rank makes its part of them."""
    batches: list[list[Slot]] = [[] for _ in range(NUM_STEPS)]
    for rank in range(world):
        plan = plan_of(data, Cursor(), rank, world, copies)
        units = even_parts((plan.stop_slot - plan.first_slot) // copies, max(1, workers))
        parts = [(a * copies, b * copies) for a, b in units]
        for number in range(len(parts)):
            tasks = (step[number] for step in plan.tasks(parts))
            made = produce(Listed(tasks), WorkerSetup(TRAIN, takedown or Takedown()), threading.Event())
            for batch, part in zip(batches, made, strict=False):
                assert part.batch.images is not None
                columns = (part.batch.ids, part.batch.weight, part.batch.seeds)
                pixels = [image.numpy().tobytes() for image in part.batch.images]
                batch += [Slot(*row) for row in zip(*(column.tolist() for column in columns), pixels, strict=True)]
            made.close()  # type: ignore[attr-defined]
    return batches


@pytest.fixture(scope="module")
def expected(ninety: Manifest) -> list[list[Slot]]:
    return global_batches(ninety, 1, 0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("workers", WORKERS)
def test_global_batches_are_equal_for_all_worlds_and_workers(ninety, expected, world: int, workers: int) -> None:
    """Slots, ids, weights, seeds and pixels, over two ends of an epoch and two corrupt samples."""
    assert global_batches(ninety, world, workers) == expected
    for epoch in range(2):
        seeds = {derive_seed(3, epoch, i): i for i in range(90)}
        drawn = [slot.id for batch in expected for slot in batch if seeds.get(slot.seed) == slot.id]
        assert sorted(drawn) == list(range(90)), "each once"
    assert {slot.id for batch in expected for slot in batch if not slot.weight} == {17, 60}


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("workers", WORKERS)
def test_real_loaders_agree(ninety: Manifest, expected, world: int, workers: int) -> None:
    """The same through the loader itself, with its processes."""
    batches: list[list[Slot]] = [[] for _ in range(NUM_STEPS)]
    for rank in range(world):
        options = {"seed": 3, "global_batch": GLOBAL_BATCH, "block": 8, "lanes": 4, "window": 16}
        with loader_of(ninety, TRAIN, rank=rank, world_size=world, workers=workers, micro_batch=4, **options) as loader:
            for batch, step in zip(batches, loader.steps(Cursor()), strict=False):
                for micro in step.micro:
                    assert micro.images is not None
                    columns = (micro.ids, micro.weight, micro.seeds)
                    pixels = [image.numpy().tobytes() for image in micro.images]
                    batch += [Slot(*row) for row in zip(*(column.tolist() for column in columns), pixels, strict=True)]
    assert batches == expected


@pytest.fixture(scope="module")
def mixture(ninety: Manifest, forty: Manifest) -> tuple[TrainingSource, ...]:
    return (TrainingSource(ninety, 2), TrainingSource(forty, 1))


@pytest.mark.parametrize(("world", "workers"), [(2, 1), (3, 2), (4, 4)])
def test_mixtures_are_equal_for_all_worlds_and_workers(mixture, world: int, workers: int) -> None:
    right = global_batches(mixture, 1, 0)
    assert global_batches(mixture, world, workers) == right
    for batch in right:
        assert sum(slot.id < 90 for slot in batch) == 16, "exactly two of three from the first"


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (1, 3), (4, 2)])
def test_copies_are_equal_for_all_worlds_and_workers(ninety: Manifest, world: int, workers: int) -> None:
    right = global_batches(ninety, 1, 0, copies=3)
    assert global_batches(ninety, world, workers, copies=3) == right
    for batch in right:
        for first in range(0, GLOBAL_BATCH, 3):
            ids, weights, seeds, pixels = (set(column) for column in zip(*batch[first : first + 3], strict=True))
            assert (len(ids), len(weights), len(seeds)) == (1, 1, 3)
            assert weights == {0.0} or len(pixels) == 3, "three crops of one image"
    once = [slot.id for batch in right for slot in batch[::3]]
    assert len(set(once)) == len(once) == NUM_STEPS * 8, "another image in each three slots"


def test_a_takedown_list_changes_weights_and_nothing_else(ninety: Manifest, expected) -> None:
    found = global_batches(ninety, 2, 1, takedown=takedown_of(["000003", "000044", "no such key"]))
    for batch, right in zip(found, expected, strict=True):
        for slot, other in zip(batch, right, strict=True):
            if slot.id in (3, 44):
                assert slot._replace(weight=1.0, pixels=b"") == other._replace(pixels=b"")
                assert slot.weight == 0
                assert not any(slot.pixels)
            else:
                assert slot == other


RANK = """
import hashlib, json, sys, time
from pipeline.data.loader import Cursor
from tests.support.loaders import loader_of
from pipeline.data.manifest import read_manifest
from pipeline.data.images.transforms import ImageExample, TrainImage
url, rank, world, epoch, offset, workers, out = sys.argv[1:]
options = dict(seed=3, global_batch=24, block=8, lanes=4, window=16, workers=int(workers))
transform = ImageExample(TrainImage((16, 16)), label=True)
loader = loader_of(read_manifest(url), transform, rank=int(rank), world_size=int(world), **options)
for step in loader.steps(Cursor(int(epoch), int(offset))):
    (batch,) = step.micro
    pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
    rows = list(zip(batch.ids.tolist(), batch.weight.tolist(), batch.seeds.tolist(), pixels))
    with open(out, "a") as file:
        file.write(json.dumps({"after": step.after, "rows": rows}) + "\\n")
    time.sleep(0.03)
"""


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_kills_and_changes_of_the_world_in_mid_epoch(ninety: Manifest, expected, tmp_path: Path, workers: int) -> None:
    """2 ranks, killed; 3 ranks, killed; 1 rank: each goes on where the slowest rank of the one before had come."""
    draw, cursor, taken = random.Random(5), Cursor(), []
    for world in (2, 3, 1):
        files = [tmp_path / f"{world}-{rank}" for rank in range(world)]
        arguments = [ninety.url, *map(str, (world, *cursor, workers))]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, arguments[0], str(rank), *arguments[1:], str(file)], start_new_session=True
            )
            for rank, file in enumerate(files)
        ]
        enough = NUM_STEPS - len(taken) if world == 1 else draw.randint(2, 3)
        try:
            deadline = time.monotonic() + 240
            while any(not file.exists() or len(file.read_text().splitlines()) < enough for file in files):
                assert time.monotonic() < deadline
                assert all(process.poll() is None for process in ranks), "a rank ended by itself"
                time.sleep(0.01)
        finally:
            for process in ranks:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        lines = [file.read_text().splitlines()[:enough] for file in files]
        for step in zip(*lines, strict=True):
            parts = [json.loads(part) for part in step]
            assert len({tuple(part["after"]) for part in parts}) == 1
            cursor = Cursor(*parts[0]["after"])
            taken.append([tuple(row) for part in parts for row in part["rows"]])
    right = [
        [(slot.id, slot.weight, slot.seed, hashlib.sha256(slot.pixels).hexdigest()) for slot in batch]
        for batch in expected
    ]
    assert taken[:NUM_STEPS] == right


def test_a_plan_starts_anywhere_in_constant_time(ninety: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume computes what it needs from the cursor: as many calls in epoch 1000 as at the start."""
    from pipeline.data.order import permutation as order

    calls: list[int] = []
    real = order.Order.slots
    monkeypatch.setattr(order.Order, "slots", lambda *args, **more: calls.append(1) or real(*args, **more))
    for cursor in (Cursor(), Cursor(1000, 41)):
        calls.clear()
        next(plan_of(ninety, cursor, 0, 1).tasks([(0, GLOBAL_BATCH)]))
        assert len(calls) == 1


def test_ranks_see_the_same_tensors_whoever_makes_them(ninety: Manifest) -> None:
    loaders = [
        loader_of(ninety, TRAIN, seed=3, global_batch=24, rank=rank, world_size=2, block=8, lanes=4, window=16)
        for rank in range(2)
    ]
    steps = []
    for loader in loaders:
        with loader:
            steps.append(next(loader.steps(Cursor(0, 48))))
    images = torch.cat([step.micro[0].images for step in steps])  # type: ignore[misc]
    right = np.concatenate([np.frombuffer(slot.pixels, np.uint8) for slot in global_batches(ninety, 1, 0)[2]])
    assert images.numpy().tobytes() == right.tobytes()
