"""Boxes and masks travel with their image: compared with Pillow's and torchvision's own operations."""

from __future__ import annotations

import io
import json
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision import tv_tensors
from torchvision.transforms import v2

from pipeline.data.batch import Instances, RawSample, collate
from pipeline.data.images.views import Box, View, fitted, large_scale_jitter, random_crop
from pipeline.data.instances import Fitted, InstanceExample, LargeScaleJitter, decode_masks, view_instances, view_mask

HEIGHT, WIDTH = 60, 84


def blobs(count: int = 4, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Ragged masks [n, H, W], as objects have."""
    rng = np.random.default_rng(1)
    noise = rng.random((count, 6, 8))
    large = [Image.fromarray(n).resize((width, height), Image.Resampling.BICUBIC) for n in noise]
    masks = np.stack([np.asarray(n) > 0.7 for n in large])
    masks[-1] = False
    masks[-1, :5, :7] = True  # easily cut away
    return masks


def encode(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def instances_of(masks: np.ndarray) -> Instances:
    encoded = tuple(encode(mask) for mask in masks)
    boxes = torch.tensor(np.array([coco_mask.toBbox(mask) for mask in encoded]), dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    return Instances(boxes, torch.arange(len(masks)) + 5, encoded, torch.tensor([0, 1] * (len(masks) // 2)))


def sample() -> RawSample:
    """A photo-like picture, and objects whose pixels are marked in it."""
    colours = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(buffer, "PNG")
    objects = []
    for number, mask in enumerate(blobs()):
        rle = encode(mask)
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
        box = coco_mask.toBbox(rle).tolist()
        objects.append({"bbox": box, "category_id": number, "segmentation": segmentation, "iscrowd": 0, "area": 1})
    return RawSample(0, "key", {"png": buffer.getvalue(), "json": json.dumps({"annotations": objects}).encode()})


def in_pillows_steps(image: Image.Image, view_seed: int, canvas: tuple[int, int], resampling: int) -> np.ndarray:
    """Mirror, resize, crop, pad: the recipe of large-scale jitter one step after another, with the same draws."""
    draw = random.Random(view_seed)
    if draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    factor, share = draw.uniform(0.1, 2.0), draw.random()
    by = min(canvas[0] * factor / image.height, canvas[1] * factor / image.width)
    image = image.resize((round(image.width * by), round(image.height * by)), resampling)
    left = round(max(image.width - canvas[1], 0) * share)
    top = round(max(image.height - canvas[0], 0) * share)
    image = image.crop((left, top, min(left + canvas[1], image.width), min(top + canvas[0], image.height)))
    padded = Image.new(image.mode, (canvas[1], canvas[0]))
    padded.paste(image)
    return np.asarray(padded)


def on_borders(view: View | None) -> np.ndarray:
    """Where a pixel's centre lies on the border of two stored pixels: Pillow's sums of steps round either way there."""
    assert view is not None
    box, on_border = view.box, np.zeros(view.shape, bool)
    y = box.top + (np.arange(view.size[0]) + 0.5) * (box.bottom - box.top) / view.size[0]
    x = box.left + (np.arange(view.size[1]) + 0.5) * (box.right - box.left) / view.size[1]
    rows, columns = (np.abs(centres - np.round(centres)) < 1e-6 for centres in (y, x))
    on_border[: view.size[0], : view.size[1]] = rows[:, None] | columns[None, :: -1 if view.mirror else 1]
    return on_border


@pytest.mark.parametrize("canvas", [(64, 64), (48, 80)])
def test_large_scale_jitter_does_what_its_steps_do_one_by_one(canvas: tuple[int, int]) -> None:
    source, masks = sample(), blobs()
    picture = Image.open(io.BytesIO(source.members["png"]))
    transform = InstanceExample(LargeScaleJitter(canvas), fill=(0, 0, 0))
    num_kept = 0
    for seed in range(40):
        example = transform(source, seed)
        expected = in_pillows_steps(picture, seed, canvas, Image.Resampling.BILINEAR)
        assert example.image is not None
        difference = np.abs(example.image.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= 2, "but for the rounding of a mirrored resize's two passes"
        right = np.stack([in_pillows_steps(Image.fromarray(m), seed, canvas, Image.Resampling.NEAREST) for m in masks])
        kept = [i for i in range(len(masks)) if right[i].any()]
        assert example.instances is not None
        assert example.instances.labels.tolist() == kept
        found = decode_masks(example.instances.masks, canvas).numpy()
        differ = found != right[kept].astype(bool)
        assert not (differ & ~on_borders(example.instances.view)).any()
        for box, mask in zip(example.instances.boxes.tolist(), found, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        num_kept += len(kept)
    assert num_kept < 40 * len(masks), "some objects fell out of view"


def test_crops_agree_with_torchvisions_v2() -> None:
    """Masks to the pixel, with its exact nearest neighbour; boxes as it moves and clips them."""
    masks = blobs()
    stored = instances_of(masks)
    for seed in range(20):
        draw = random.Random(seed)
        box = random_crop(HEIGHT, WIDTH, (0.2, 1.0), (3 / 4, 4 / 3), draw)
        mirror = draw.random() < 0.5
        view = View((HEIGHT, WIDTH), box, (32, 40), mirror)
        top, left, height, width = (int(v) for v in (box.top, box.left, box.bottom - box.top, box.right - box.left))
        theirs = tv_tensors.Mask(torch.from_numpy(masks[:, top : top + height, left : left + width]))
        theirs = torch.nn.functional.interpolate(theirs[None].float(), (32, 40), mode="nearest-exact")[0]
        boxes = tv_tensors.BoundingBoxes(stored.boxes, format="XYXY", canvas_size=(HEIGHT, WIDTH))  # type: ignore[call-arg]
        boxes = v2.functional.resized_crop(boxes, top, left, height, width, [32, 40])
        if mirror:
            theirs = v2.functional.horizontal_flip(theirs)
            boxes = v2.functional.horizontal_flip(boxes)
        boxes = v2.functional.clamp_bounding_boxes(boxes)
        seen = view_instances(stored, view)
        kept = [number - 5 for number in seen.labels.tolist()]
        assert kept == [i for i in range(len(masks)) if theirs[i].any()]
        assert torch.equal(decode_masks(seen.masks, (32, 40)), theirs[kept].bool())
        assert seen.crowd.tolist() == stored.crowd[kept].tolist()
        assert torch.allclose(view.shown(stored.boxes), boxes.as_subclass(torch.Tensor), atol=1e-4)


def test_boxes_go_there_and_back() -> None:
    for seed in range(50):
        view = large_scale_jitter(60, 84, (64, 64), (0.1, 2.0), flip=True, draw=random.Random(seed))
        box = view.box
        inner = torch.tensor([[box.left + 1, box.top + 2, box.right - 3, box.bottom - 4]]).clamp(min=0)
        if box.right - box.left > 5 and box.bottom - box.top > 7:
            assert torch.allclose(view.stored(view.shown(inner)), inner, atol=1e-3)
        assert view.box.left >= 0
        assert view.box.right <= 84 + 1e-9
        assert view.shape == (64, 64)


def test_large_scale_jitter_draws_uniform_scales_and_one_share_of_the_leeway() -> None:
    from scipy.stats import kstest

    views = [
        large_scale_jitter(1000, 1000, (500, 500), (0.1, 2.0), flip=True, draw=random.Random(seed))
        for seed in range(2000)
    ]
    factors = [view.size[0] / (view.box.bottom - view.box.top) * 2 for view in views]
    assert kstest(factors, "uniform", args=(0.1, 1.9)).pvalue > 1e-4
    assert 900 < sum(view.mirror for view in views) < 1100
    large = [view for view in views if view.size == (500, 500) and view.box.bottom - view.box.top < 900]
    shares = [view.box.top / (1000 - (view.box.bottom - view.box.top)) for view in large]
    assert kstest(shares, "uniform").pvalue > 1e-4
    for view in large:
        left = 1000 - view.box.right if view.mirror else view.box.left
        assert left == pytest.approx(view.box.top, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "canvas", "fits"),
    [((60, 84), (42, 42), (30, 42)), ((84, 60), (42, 42), (42, 30)), ((10, 10), (64, 32), (32, 32))],
)
def test_a_fitted_view_shows_the_whole_image(size, canvas, fits) -> None:
    view = fitted(*size, canvas)
    assert (view.size, view.shape) == (fits, canvas)
    corners = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    assert view.shown(corners).tolist() == [[0, 0, fits[1], fits[0]]]
    assert view.stored(torch.tensor([[0.0, 0.0, canvas[1], canvas[0]]])).tolist() == corners.tolist(), "padding clipped"


def test_an_evaluation_gets_the_objects_as_they_were_stored() -> None:
    example = InstanceExample(Fitted((42, 42)), objects="stored")(sample(), 0)
    assert example.image is not None
    assert example.instances is not None
    assert (decode_masks(example.instances.masks, (HEIGHT, WIDTH)).numpy() == blobs()).all()
    assert example.instances.view is not None
    assert example.instances.view.size == (30, 42)
    assert torch.equal(
        example.image[:, 30:], torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None].expand(3, 12, 42)
    )


def test_blanks_and_examples_make_one_batch_that_pickles() -> None:
    transform = InstanceExample(LargeScaleJitter((48, 48)))
    batch = collate([transform(sample(), 3), transform.blank()], [0, -1], [3, 0], [1.0, 0.0], 0)
    assert batch.images is not None
    assert batch.images.shape == (2, 3, 48, 48)
    again = pickle.loads(pickle.dumps(batch))
    assert again.instances[1].boxes.shape == (0, 4)
    assert again.instances[0].view == batch.instances[0].view  # type: ignore[index]
    assert pickle.loads(pickle.dumps(transform)) == transform


def test_a_mask_of_another_images_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a mask of \[60, 84\] on an image of \[60, 80\]"):
        view_mask(encode(blobs()[0]), View((60, 80), Box(0, 0, 80, 60), (30, 40)))


def test_no_masks_decode_to_none() -> None:
    assert decode_masks((), (4, 6)).shape == (0, 4, 6)


def test_boxes_alone_are_moved_as_torchvision_moves_them() -> None:
    """And those that the cut removes are left out; what masks would show plays no part."""
    transform = InstanceExample(LargeScaleJitter((48, 48)), masks=False)
    stored = instances_of(blobs())
    num_kept = 0
    for seed in range(30):
        shown = transform(sample(), seed).instances
        assert shown is not None
        assert shown.view is not None
        assert shown.masks == ()
        view = shown.view
        (top, left), (bottom, right) = (view.box.top, view.box.left), (view.box.bottom, view.box.right)
        boxes = stored.boxes - torch.tensor([left, top, left, top])
        boxes *= torch.tensor([view.size[1] / (right - left), view.size[0] / (bottom - top)]).repeat(2)
        theirs = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=view.size)  # type: ignore[call-arg]
        if view.mirror:
            theirs = v2.functional.horizontal_flip(theirs)
        theirs = v2.functional.clamp_bounding_boxes(theirs)
        kept = ((theirs[:, 2:] - theirs[:, :2]) > 1e-5).all(1)
        torch.testing.assert_close(shown.boxes, theirs.as_subclass(torch.Tensor)[kept], rtol=1e-4, atol=1e-3)
        assert shown.labels.tolist() == kept.nonzero().flatten().tolist()
        num_kept += int(kept.sum())
    assert 0 < num_kept < 30 * len(stored.labels), "some fell out of view"
