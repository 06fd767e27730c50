"""Batches and the seeds everything random derives from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.data.batch import Batch, Example, Instances, collate, derive_seed, generators


def test_seeds_are_pinned() -> None:
    """A change here changes the augmentation of every run that resumes."""
    assert derive_seed(0, 1, 2) == 1_772_749_440_416_956_875
    assert derive_seed("masks", 5) == 4_578_578_477_286_034_768
    assert derive_seed(np.int64(0), 1, np.int32(2)) == derive_seed(0, 1, 2)


def test_seeds_differ_and_fit_int64() -> None:
    seeds = {derive_seed(0, epoch, i) for epoch in range(10) for i in range(1000)}
    assert len(seeds) == 10_000
    assert all(seed in range(2**63) for seed in seeds)


def test_generators_are_a_function_of_seed_and_purpose() -> None:
    seeds = torch.tensor([3, 4])
    draws = [torch.rand(4, generator=g) for g in generators(seeds, "mask")]
    assert torch.equal(draws[0], torch.rand(4, generator=generators(seeds.flip(0), "mask")[1]))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], torch.rand(4, generator=generators(seeds, "noise")[0]))


def test_collate_stacks_what_is_there() -> None:
    examples = [Example(image=torch.full((3, 2, 2), i, dtype=torch.uint8), label=i) for i in range(3)]
    batch = collate(examples, [7, 8, -1], [1, 2, 0], [1, 1, 0], 40)
    assert batch.images is not None
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1, 2]
    assert batch.text is None
    assert batch.instances is None
    assert len(batch) == 3
    assert batch.position == 40
    assert batch.to("cpu").ids.tolist() == [7, 8, -1]


def test_collate_refuses_what_doesnt_fit() -> None:
    with pytest.raises(ValueError, match="1 of 2 examples have no label"):
        collate([Example(label=1), Example()], [0, 1], [0, 0], [1, 1], 0)
    images = [Example(image=torch.zeros(3, 2, n, dtype=torch.uint8)) for n in (2, 3)]
    with pytest.raises(ValueError, match=r"image shapes differ: \[\(3, 2, 2\), \(3, 2, 3\)\]"):
        collate(images, [0, 1], [0, 0], [1, 1], 0)


def full(size: int) -> Batch:
    """A batch in which no field is empty."""
    numbers = torch.arange(size)
    objects = Instances(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), (), torch.zeros(1, dtype=torch.int64))
    return Batch(
        ids=numbers,
        seeds=numbers * 3,
        weight=torch.ones(size),
        position=7,
        images=numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(size, 3, 2, 2),
        text=numbers.view(-1, 1).expand(size, 4),
        labels=numbers % 2,
        instances=tuple(objects._replace(boxes=torch.full((1, 4), float(i))) for i in range(size)),
    )


def test_every_field_is_cut_moved_and_sent() -> None:
    """Whoever adds a field adds it here, and everything that handles batches knows it."""
    batch = full(5)
    fields = {field.name for field in dataclasses.fields(Batch)}
    assert all(getattr(batch, name) is not None for name in fields), "give the new field a value in `full`"
    assert batch.per_sample().keys() == fields - {"position"}
    assert batch.tensors().keys() == fields - {"position", "instances"}
    assert batch.to("meta").tensors().keys() == batch.tensors().keys()
    assert all(tensor.is_meta for tensor in batch.to("meta").tensors().values())
    first, second, last = batch.cut(2)
    assert [len(part) for part in (first, second, last)] == [2, 2, 1]
    for name, values in batch.per_sample().items():
        parts = [part.per_sample()[name] for part in (first, second, last)]
        joined = torch.cat(parts) if isinstance(values, torch.Tensor) else sum(parts, ())
        assert all(a is b if name == "instances" else bool((a == b).all()) for a, b in zip(joined, values, strict=True))
    assert {part.position for part in (first, second, last)} == {7}


def test_cutting_copies_nothing() -> None:
    batch = full(4)
    part = batch.at(slice(1, 3))
    storage = {name: tensor.untyped_storage().data_ptr() for name, tensor in batch.tensors().items()}
    assert {name: tensor.untyped_storage().data_ptr() for name, tensor in part.tensors().items()} == storage
