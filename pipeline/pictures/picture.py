"""Pictures: images side by side with captions, drawn as tensors, so that no plotting library is needed."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Shaped, UInt8
from torch import Tensor

from pipeline.data.batch import Batch

GRAY = 128  # pixel value of what a picture hides
PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#800000", "#000075")


class Picture(NamedTuple):
    """Panels to be shown side by side, in the report or by `predict`."""

    title: str
    panels: tuple[tuple[str, UInt8[Tensor, "3 h w"]], ...]  # (caption, image)


def first_present(batch: Batch, most: int) -> list[int]:
    """Rows of the first `most` samples of a batch that aren't padding."""
    rows: list[int] = (batch.weight > 0).nonzero().flatten()[:most].tolist()
    return rows


def sample_title(batch: Batch, row: int) -> str:
    """The title of a sample's picture."""
    return f"sample {int(batch.ids[row])}"


def enlarge(image: Shaped[Tensor, "c h w"], factor: int) -> Shaped[Tensor, "c h2 w2"]:
    """An image, or masks, with each pixel as a square of `factor` x `factor` pixels."""
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
