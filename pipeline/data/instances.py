"""The annotated objects of an image, put through the same view as its pixels.

Legend: n objects, H W pixels of the stored image, h w of what a view shows.

Masks stay run-length encoded (COCO's RLE): a stage decodes those it needs with `decode_masks`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64
from pycocotools import mask as coco_mask
from torch import Tensor

from pipeline.data.annotations import read_instances
from pipeline.data.batch import Example, Instances, RawSample
from pipeline.data.images.decode import ImageHeader, read_header
from pipeline.data.images.pixels import IMAGENET_FILL, Colour, Interpolation, show
from pipeline.data.images.views import View, fitted, large_scale_jitter
from pipeline.data.reading.members import image_member

RLE = Mapping[str, object]
_EMPTY_BELOW = 1e-5  # pixels of a box's side


def view_instances(instances: Instances, view: View) -> Instances:
    """The objects of a stored image as a view shows them, those that aren't in view left out.

    Masks are sampled at the nearest pixel centre, as Pillow and detectron2 do; each box is drawn anew around what its
    mask shows, as detectron2's `recompute_boxes` does for large-scale jitter, so a box never holds a part that was
    cut away. Objects without masks have their boxes moved and cut.
    """
    if not instances.masks:
        return _view_boxes(instances, view)
    visible, boxes, masks = [], [], []
    rows, columns = _sampled(view)
    for number, mask in enumerate(instances.masks):
        seen = view_mask(mask, view, rows, columns)
        x, y, w, h = coco_mask.toBbox(seen).tolist()
        if w > 0 and h > 0:
            visible.append(number)
            boxes.append((x, y, x + w, y + h))
            masks.append(seen)
    index = torch.tensor(visible, dtype=torch.int64)
    return Instances(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=instances.labels[index],
        masks=tuple(masks),
        crowd=instances.crowd[index],
        view=view,
    )


def _view_boxes(instances: Instances, view: View) -> Instances:
    """Boxes alone; of no area in view are those left out that detectron2 leaves out (`filter_empty_instances`)."""
    boxes = view.shown(instances.boxes)
    visible = ((boxes[:, 2:] - boxes[:, :2]) > _EMPTY_BELOW).all(1)
    return Instances(boxes[visible], instances.labels[visible], (), instances.crowd[visible], view)


def view_mask(
    mask: RLE, view: View, rows: Int64[np.ndarray, " h"] | None = None, columns: Int64[np.ndarray, " w"] | None = None
) -> dict[str, Any]:
    """One mask of the stored image as a view shows it, encoded again; `rows` and `columns` are found where not given.

    Raises:
        ValueError: the mask is of another size than the view's image.
    """
    if tuple(mask["size"]) != view.source:  # type: ignore[arg-type]
        raise ValueError(f"a mask of {mask['size']} on an image of {list(view.source)}")
    if rows is None or columns is None:
        rows, columns = _sampled(view)
    stored = coco_mask.decode(dict(mask)).T  # [W, H]: RLE runs down the columns
    seen = np.zeros(view.shape[::-1], np.uint8)  # [w, h]
    seen[: len(columns), : len(rows)] = stored[columns][:, rows]
    encoded: dict[str, Any] = coco_mask.encode(seen.T)
    return encoded


def decode_masks(masks: Sequence[RLE], size: tuple[int, int]) -> Bool[Tensor, "n h w"]:
    """The pixels of masks of `size` (h, w)."""
    if not masks:
        return torch.zeros((0, *size), dtype=torch.bool)
    pixels = coco_mask.decode([dict(mask) for mask in masks])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).bool()


def _sampled(view: View) -> tuple[Int64[np.ndarray, " h"], Int64[np.ndarray, " w"]]:
    """Row and column of the stored image that lies under each of the result's pixel centres."""
    box, (h, w), (height, width) = view.box, view.size, view.source
    rows = _nearest(box.top, box.bottom, h, height)
    if view.mirror:  # the mirrored image is what is sampled, which decides where a centre falls between two pixels
        return rows, width - 1 - _nearest(width - box.right, width - box.left, w, width)
    return rows, _nearest(box.left, box.right, w, width)


def _nearest(start: float, stop: float, count: int, limit: int) -> Int64[np.ndarray, " count"]:
    centres = start + (np.arange(count) + 0.5) * ((stop - start) / count)
    # A centre on the border of two pixels belongs to the latter, whatever the rounding of the line above.
    places: Int64[np.ndarray, " count"] = np.clip(np.floor(centres + 1e-6).astype(np.int64), 0, limit - 1)
    return places


@runtime_checkable
class Placement(Protocol):
    """Draws the view of an image from its size and the sample's seed; must pickle."""

    @property
    def canvas(self) -> tuple[int, int]: ...

    def __call__(self, header: ImageHeader, seed: int) -> View: ...


@dataclasses.dataclass(frozen=True)
class LargeScaleJitter:
    """See `pipeline.data.images.views.large_scale_jitter`; the default range of scales is ViTDet's."""

    canvas: tuple[int, int]
    scale: tuple[float, float] = (0.1, 2.0)
    flip: bool = True

    def __call__(self, header: ImageHeader, seed: int) -> View:
        draw = random.Random(seed)
        return large_scale_jitter(header.height, header.width, self.canvas, self.scale, flip=self.flip, draw=draw)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The whole image, as large as the canvas allows; see `pipeline.data.images.views.fitted`."""

    canvas: tuple[int, int]

    def __call__(self, header: ImageHeader, seed: int) -> View:
        return fitted(header.height, header.width, self.canvas)


@dataclasses.dataclass(frozen=True)
class InstanceExample:
    """An image on a canvas of fixed size with its annotated objects: what detection and segmentation train on.

    Args:
        placement: draws the view.
        objects: `"shown"` puts the objects through the view; `"stored"` leaves them in pixels of the stored image,
            all of them and as annotated, which is what an evaluation compares with (`View.stored` brings predictions
            there).
        masks: take the objects' masks too, which they must have then; else boxes alone.
        num_classes: of the data set, among which every object's must be; None: any number will do.
        interpolation: of the antialiased resize.
        fill: colour of the padding, by default the nearest to ImageNet's mean, which normalises to about zero. A stage
            that wants exact zeros clears what lies outside `instances.view.size`.

    Raises (when called):
        UnreadableSample: the image or the annotations are missing or damaged.
    """

    placement: Placement
    objects: Literal["shown", "stored"] = "shown"
    masks: bool = True
    num_classes: int | None = None
    interpolation: Interpolation = "bilinear"
    fill: Colour = IMAGENET_FILL

    def __call__(self, sample: RawSample, seed: int) -> Example:
        data = image_member(sample)
        header = read_header(data)
        stored = read_instances(
            sample,
            header.height,
            header.width,
            as_annotated=self.objects == "stored",
            masks=self.masks,
            num_classes=self.num_classes,
        )
        view = self.placement(header, seed)
        image = show(data, header, view, self.interpolation, self.fill)
        instances = view_instances(stored, view) if self.objects == "shown" else stored._replace(view=view)
        return Example(image=image, instances=instances)

    def blank(self) -> Example:
        """A canvas of the fill colour without objects, in view of itself."""
        canvas = self.placement.canvas
        image = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None].expand(3, *canvas).contiguous()
        nothing = Instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (), torch.zeros(0, dtype=torch.int64))
        return Example(image=image, instances=nothing._replace(view=fitted(*canvas, canvas)))
