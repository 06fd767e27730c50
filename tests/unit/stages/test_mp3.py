"""Stage `mp3`: positions are learned from looks alone, against a context that is a subset."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config import validate
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError
from pipeline.models.pixels import normalize, patchify, unpatchify
from pipeline.pictures.patches import put_in_place
from pipeline.pictures.picture import GRAY
from pipeline.stages.base import DataFacts
from pipeline.stages.mp3 import Mp3Options, Mp3Stage

MODEL = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}


def build(**changes: object) -> Mp3Stage:
    torch.manual_seed(0)
    return Mp3Stage(validate(Mp3Options, {"model": MODEL} | changes, where="test"), DataFacts(classes=("a", "b")))


def batch_of(num: int = 4, **changes: object) -> Batch:
    images = torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    fields = {"ids": torch.arange(num), "seeds": torch.arange(num) + 100, "weight": torch.ones(num)}
    return Batch(**(fields | {"position": 0, "images": images} | changes))


def shuffled(images: Tensor, order: Tensor) -> Tensor:
    return unpatchify(patchify(images, 8)[:, order], (4, 4))


@pytest.mark.parametrize("position", ["sincos2d", "learned"])
def test_where_a_patch_lies_can_not_be_read_off_its_place(position: str) -> None:
    """The trap: positions, or anything else that depends on the order, would make the task trivial."""
    stage = build(model=MODEL | {"position": position}).double()
    assert stage.trunk.pos_embed is None
    pixels = normalize(batch_of(2).images, "imagenet").double()
    context = torch.tensor([[3, 7, 11], [0, 1, 2]])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    moved = stage.scores(shuffled(pixels, order), order.argsort()[context])
    torch.testing.assert_close(moved, stage.scores(pixels, context)[:, order], rtol=1e-9, atol=1e-9)


def test_patches_outside_the_context_are_seen_by_themselves_alone() -> None:
    stage = build()
    pixels, context = normalize(batch_of(1).images, "imagenet"), torch.tensor([[3, 7, 11]])
    before = stage.scores(pixels, context)
    changed = pixels.clone()
    changed[..., :8, :8] += 1  # patch 0, outside
    moved = (stage.scores(changed, context) - before).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [0]
    changed = pixels.clone()
    changed[..., :8, 24:] += 1  # patch 3, inside
    assert ((stage.scores(changed, context) - before).abs().amax(-1)[0] > 1e-6).all()


def test_the_loss_is_cross_entropy_over_all_patches_places() -> None:
    stage, batch = build(label_smoothing=0.1), batch_of(3, weight=torch.tensor([1.0, 0, 2]))
    scores = stage.scores(normalize(batch.images, "imagenet"), stage.context(batch).keep)
    expected = [
        torch.nn.functional.cross_entropy(sample_scores, torch.arange(16), label_smoothing=0.1) * weight
        for sample_scores, weight in zip(scores, batch.weight, strict=True)
    ]
    torch.testing.assert_close(stage.loss(batch).total, sum(expected))
    assert stage.loss(batch).parts["cross_entropy"] < 3 * 2.9 * 1.2


def test_contexts_belong_to_samples_and_have_the_size_asked_for() -> None:
    stage, batch = build(context_ratio=0.3), batch_of(4)
    context = stage.context(batch)
    assert context.keep.shape == (4, 4)
    part = batch_of(2, seeds=batch.seeds[2:], images=batch.images[2:])
    assert torch.equal(stage.context(part).keep, context.keep[2:])
    later = batch_of(4, seeds=batch.seeds + 1000)
    assert not torch.equal(stage.context(later).keep, context.keep)


def test_it_learns_to_place_patches_that_look_different() -> None:
    """Chance is 1/16; in a picture of sixteen brightness steps every patch has its own look."""
    stage = build(context_ratio=0.5)
    steps = (torch.arange(16) * 16).view(1, 16, 1).expand(4, -1, 192).float()
    images = unpatchify(steps, (4, 4)).to(torch.uint8)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    for step in range(80):
        stage.zero_grad()
        stage.loss(batch_of(4, images=images, seeds=torch.arange(4) + 4 * step)).total.backward()
        optimizer.step()
    with torch.no_grad():
        predictions = stage.eval().predict(batch_of(4, images=images))
    assert predictions["position_top1"].mean() > 0.9
    batch = batch_of(4, images=images)
    (_, original), (_, seen), (_, placed) = stage.pictures(batch, predictions)[0].panels
    assert (placed == original).float().mean() > 0.9
    hidden = predictions["outside"][0].view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert (seen[:, hidden] == GRAY).all()
    assert torch.equal(seen[:, ~hidden], original[:, ~hidden])


def test_the_surest_patch_wins_a_place_and_empty_places_are_gray() -> None:
    image = torch.arange(4).repeat_interleave(64).view(1, 4, 64).repeat(1, 1, 3).float()
    picture = unpatchify(image, (2, 2))[0].to(torch.uint8)
    placed = put_in_place(picture, torch.tensor([1, 1, 3, 0]), torch.tensor([0.9, 0.2, 0.5, 0.5]), 8)
    assert placed[0, ::8, ::8].tolist() == [[3, 0], [GRAY, 2]]


def test_features_for_neighbours_come_from_whole_images() -> None:
    stage, batch = build(evaluate=["knn"]).eval(), batch_of(2, labels=torch.tensor([0, 1]))
    predictions = stage.predict(batch)
    torch.testing.assert_close(
        predictions["features"], stage.trunk(normalize(batch.images, "imagenet")).patches.mean(1)
    )
    assert list(stage.evaluations()) == ["knn"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_ratio": 0.05}, "no context of 16 patches"),
        ({"context_ratio": 0.0}, "context_ratio"),
        ({"model": MODEL | {"patch_size": 32}, "context_ratio": 1.0}, "a single patch"),
        ({"model": MODEL | {"patch_embed": "conv_stem"}}, "reveal the positions"),
        ({"model": MODEL | {"relative_positions": True, "cls_token": False}}, "reveal the positions"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)
