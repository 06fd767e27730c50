"""Pictures of retrieval: captions with the images that match them best."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Int
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.evaluate.base import Predictions
from pipeline.pictures.picture import Picture

MAX_PICTURES = 6
NUM_MATCHES = 4  # images shown for a caption


def caption_pictures(
    batch: Batch, predictions: Predictions, decode: Callable[[Int[Tensor, " l"]], str]
) -> list[Picture]:
    """For the first captions of a batch: their own image, and the images of the batch that match best.

    Args:
        predictions: with `text_embedding` and `image_embedding` [B,E], normalised.
        decode: from a caption's tokens to its text.
    """
    assert batch.images is not None
    if batch.text is None:
        return []
    present = (batch.weight > 0).nonzero().flatten().cpu()
    texts, images = (predictions[name].float().cpu()[present] for name in ("text_embedding", "image_embedding"))
    best = (texts[:MAX_PICTURES] @ images.T).topk(min(NUM_MATCHES, len(present)), dim=1).indices
    pictures = []
    for i, matches in enumerate(best.tolist()):
        panels = [("its own image", batch.images[present[i]].cpu())]
        panels += [(f"match {k}", batch.images[present[j]].cpu()) for k, j in enumerate(matches, start=1)]
        pictures.append(Picture(decode(batch.text[present[i]]), tuple(panels)))
    return pictures
