"""Questions about images, and a stage's answers, for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from pipeline.config import Config
from pipeline.data.batch import Batch
from pipeline.pictures.classification import captioned
from pipeline.pictures.picture import Picture

QUESTION = "question"
"""The place that errors about a question name; a front end replaces it by the name of its own parameter or option."""

NUM_BEST = 5


class Question(Config):
    """What can be asked about images; stages that can be asked something specific have a subclass."""


class Answer(NamedTuple):
    """A stage's answer about one image."""

    facts: dict[str, Any]  # JSON-able
    pictures: tuple[Picture, ...] = ()


def class_answers(batch: Batch, scores: Float[Tensor, "b c"], classes: Sequence[str]) -> list[Answer]:
    """Each image's most likely classes with their probabilities, and the image captioned with the first of them."""
    assert batch.images is not None
    best = scores.float().softmax(1).topk(min(NUM_BEST, scores.shape[1]))
    answers = []
    for image, shares, numbers in zip(batch.images, best.values.tolist(), best.indices.tolist(), strict=True):
        likely = [
            {"class": classes[number], "probability": share} for share, number in zip(shares, numbers, strict=True)
        ]
        caption = f"{classes[numbers[0]]} ({shares[0]:.0%})"
        answers.append(Answer({"classes": likely}, (captioned(caption, caption, image),)))
    return answers
