"""Pictures of classified images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.pictures.picture import Picture, first_present, sample_title

MAX_PICTURES = 16


def labelled_pictures(batch: Batch, predicted: Tensor, classes: Sequence[str]) -> list[Picture]:
    """The first images of a batch, captioned with their class, where it is known, and the predicted one."""
    assert batch.images is not None
    pictures = []
    for i in first_present(batch, MAX_PICTURES):
        guess = classes[int(predicted[i])]
        caption = f"predicted {guess}"
        if batch.labels is not None:
            truth = classes[int(batch.labels[i])]
            caption = f"{truth}: right" if truth == guess else f"{truth}, predicted {guess}"
        pictures.append(captioned(sample_title(batch, i), caption, batch.images[i]))
    return pictures


def captioned(title: str, caption: str, image: Tensor) -> Picture:
    """A picture of a single image."""
    return Picture(title, ((caption, image.cpu()),))
