"""Shared by stages of dense prediction: options, and whole images placed on a canvas, with their objects."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from pipeline.data.batch import Batch, Example, Instances, RawSample
from pipeline.data.images.decode import read_header
from pipeline.data.images.pixels import show
from pipeline.data.instances import InstanceExample
from pipeline.data.reading.members import image_member
from pipeline.models.pixels import normalize
from pipeline.stages.images import ImageOptions


class DenseOptions(ImageOptions):
    """Options of stages of dense prediction."""

    jitter: tuple[float, float] | None = None  # range of the factor an image is resized by in training; None: whole
    # images, as large as fits

    @model_validator(mode="after")
    def _jitter_rises(self) -> DenseOptions:
        if self.jitter is not None and not 0 < self.jitter[0] <= self.jitter[1]:
            raise ValueError(f"jitter must be 0 < low <= high, not {self.jitter}")
        return self


def check_dense_model(options: DenseOptions, stage: str) -> None:
    """Raise ValueError for a trunk, or a crop_scale, that doesn't suit dense prediction."""
    model = options.model
    if model.cls_token or model.registers or model.final_norm:
        raise ValueError(f"stage {stage} uses patches alone: set model.cls_token and model.final_norm to false")
    if options.crop_scale != ImageOptions.model_fields["crop_scale"].default:  # a run's saved options list defaults too
        raise ValueError(f"stage {stage} doesn't use crop_scale: it shows whole images and scales them by jitter")


def content_pixels(batch: Batch, options: ImageOptions) -> Float[Tensor, "b 3 h w"]:
    """Normalised images, with padding set to zero."""
    assert batch.images is not None
    pixels = normalize(batch.images, options.pixels)
    for image, instances in zip(pixels, instances_of(batch), strict=True):
        height, width = content_size(instances, (image.shape[1], image.shape[2]))
        image[:, height:] = 0
        image[:, :, width:] = 0
    return pixels


def content_size(instances: Instances, canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image's content, without padding."""
    return canvas if instances.view is None else instances.view.size


def instances_of(batch: Batch) -> tuple[Instances, ...]:
    """The batch's annotations, which must not be None."""
    assert batch.instances is not None
    return batch.instances


@dataclasses.dataclass(frozen=True)
class PlacedExample(InstanceExample):
    """An image without annotations; `instances.view` holds how it lies on the canvas."""

    def __call__(self, sample: RawSample, seed: int) -> Example:
        data = image_member(sample)
        header = read_header(data)
        view = self.placement(header, seed)
        no_numbers = torch.zeros(0, dtype=torch.int64)
        image = show(data, header, view, self.interpolation, self.fill)
        return Example(image, instances=Instances(torch.zeros(0, 4), no_numbers, (), no_numbers)._replace(view=view))
