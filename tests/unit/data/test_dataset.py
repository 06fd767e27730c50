"""Data sets for people's own code: samples by number and in order, and as a WebDataset pipeline."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from pipeline.data.dataset import Dataset, read_dataset
from pipeline.data.images.decode import decode
from pipeline.data.manifest import Manifest
from pipeline.errors import DataError
from tests.unit.data.conftest import numbered, sample, write_data_set


def test_samples_are_read_by_number_and_in_order(data_set: Callable[..., Manifest]) -> None:
    dataset = read_dataset(data_set([5, 4]).url)
    assert len(dataset) == 9
    assert dataset.classes[:2] == ("class 0", "class 1")
    for number, read in enumerate(dataset):
        assert (read.id, read.key, read.caption) == (number, f"{number:06d}", f"caption {number}")
        assert (read.label, read.info) == (number % 7, {"number": number})
        image = next(data for name, data in sample(number).items() if name in ("jpg", "png", "webp"))
        assert np.array_equal(read.image, decode(image))
        assert np.array_equal(dataset[number].image, read.image)
    assert dataset[-1].id == 8
    with pytest.raises(IndexError):
        dataset[9]


def test_samples_are_read_in_runs_and_large_ones_alone(
    data_set: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset(data_set([7]))
    for size in (1, 20_000):
        monkeypatch.setattr("pipeline.data.dataset.READ_BYTES", size)
        assert [read.id for read in dataset] == list(range(7))


def test_what_cannot_be_decoded_is_left_out_or_named(ninety: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    dataset = Dataset(ninety)
    assert [read.id for read in dataset] == [i for i in range(90) if i not in (17, 60)]
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "sample 17 is left out", "sample 60 is left out"
    ]  # fmt: skip
    with pytest.raises(DataError, match="sample 17: bytes that are no image"):
        dataset[17]


def test_a_webdataset_pipeline_decodes_what_is_allowed_and_unpickles_nothing(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("unpickled",)

    shards = numbered([3, 2])
    shards[0][1] = ("000001", {**sample(1), "pyd": pickle.dumps(Harmful())})
    dataset = Dataset(write_data_set(str(tmp_path), shards))
    samples = list(dataset.webdataset())
    assert [s["__key__"] for s in samples] == [f"{i:06d}" for i in range(5)]
    assert set(samples[1]) == {"__key__", "__url__", "png", "txt", "json", "cls"}
    assert samples[1]["png"].dtype == np.uint8
    assert (samples[4]["txt"], samples[4]["cls"], samples[4]["json"]) == ("caption 4", 4, {"number": 4})
    assert next(iter(dataset.webdataset(decode=False)))["txt"] == b"caption 0"


def test_workers_of_a_torch_loader_share_the_shards(data_set: Callable[..., Manifest]) -> None:
    dataset = Dataset(data_set([3, 4, 2]))
    pipeline = dataset.webdataset().compose(lambda samples: (s["__key__"] for s in samples))
    keys = [key for (key,) in DataLoader(pipeline, batch_size=1, num_workers=2)]
    assert sorted(keys) == [f"{i:06d}" for i in range(9)]
