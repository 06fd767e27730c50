"""Pictures of pretraining on patches: what is hidden, and what is predicted for it.

Legend: N patches, row by row.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.evaluate.base import Predictions
from pipeline.models.pixels import patchify, unpatchify
from pipeline.pictures.picture import GRAY, Picture, first_present, sample_title

MAX_PICTURES = 8


def reconstruction_pictures(batch: Batch, predictions: Predictions, patch_size: int) -> list[Picture]:
    """Original, masked and reconstructed images of the first samples; `predictions` are stage `mae`'s."""
    assert batch.images is not None
    pictures = []
    for i in first_present(batch, MAX_PICTURES):
        image = batch.images[i].cpu()
        panels = (
            ("original", image),
            ("masked", hidden_patches(image, predictions["mask"][i].cpu(), patch_size)),
            ("reconstructed", predictions["reconstruction"][i].cpu()),
        )
        pictures.append(Picture(sample_title(batch, i), panels))
    return pictures


def position_pictures(batch: Batch, predictions: Predictions, patch_size: int) -> list[Picture]:
    """Original, context, and every patch at its predicted position; `predictions` are stage `mp3`'s."""
    assert batch.images is not None
    pictures = []
    for i in first_present(batch, MAX_PICTURES):
        image = batch.images[i].cpu()
        placed = put_in_place(image, predictions["place"][i].cpu(), predictions["confidence"][i].cpu(), patch_size)
        context = hidden_patches(image, predictions["outside"][i].cpu(), patch_size)
        pictures.append(
            Picture(sample_title(batch, i), (("original", image), ("context", context), ("placed", placed)))
        )
    return pictures


def hidden_patches(
    image: UInt8[Tensor, "3 h w"], hidden: Bool[Tensor, " n"], patch_size: int
) -> UInt8[Tensor, "3 h w"]:
    """The image with some of its patches in gray."""
    grid = hidden.view(image.shape[1] // patch_size, image.shape[2] // patch_size)
    return image.masked_fill(grid.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1), GRAY)


def put_in_place(
    image: UInt8[Tensor, "3 h w"], place: Int[Tensor, " n"], confidence: Float[Tensor, " n"], patch_size: int
) -> UInt8[Tensor, "3 h w"]:
    """The image's patches moved to their predicted places; where several go to one place the most confident is shown,
    and gray where none does.
    """
    patches = patchify(image.unsqueeze(0).float(), patch_size)[0]
    canvas = torch.full_like(patches, GRAY)
    for number in confidence.argsort().tolist():
        canvas[place[number]] = patches[number]
    grid = (image.shape[1] // patch_size, image.shape[2] // patch_size)
    return unpatchify(canvas.unsqueeze(0), grid)[0].to(torch.uint8)
