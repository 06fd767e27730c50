"""What a two-tower model is worth: zero-shot classification and retrieval, from one sweep over each set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluate.base import Measured, Predict, Sweep
from pipeline.evaluate.classification import best_classes, classification_figures
from pipeline.evaluate.collect import collect
from pipeline.evaluate.retrieval import retrieval_figures, text_groups
from pipeline.evaluate.zeroshot import class_embeddings, prompt_batches, prompts

Tokenize = Callable[[list[str]], Tensor]


class ImageTextEvaluation:
    """`<set>/zeroshot_top1` and so on where samples have labels, `<set>/retrieval_*` where they have captions.

    The stage predicts `image_embedding` and `text_embedding` [B,E] for what a batch holds, `labels`, and `text` for
    telling equal captions.
    """

    def __init__(self, classes: Sequence[str], templates: Sequence[str], tokenize: Tokenize) -> None:
        self.classes = tuple(classes)
        self.prompts = prompts(classes, templates)
        self.tokenize = tokenize

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        figures: dict[str, float] = {}
        details: dict[str, Any] = {}
        if not names:
            return Measured({})
        by_class = self._class_embeddings(predict) if self.classes else None
        for name in names:
            found = collect(predict, sweep(name), ("image_embedding", "text_embedding", "labels", "text"))
            if not len(found.get("image_embedding", ())):
                continue
            images = found["image_embedding"]
            if by_class is not None and "labels" in found:
                best = best_classes(images @ by_class.T)
                own, own_details = classification_figures(best, found["labels"], self.classes, f"{name}/zeroshot_")
                figures |= own
                details |= own_details
            if "text_embedding" in found:
                groups = text_groups(found["text"])
                figures |= retrieval_figures(images, found["text_embedding"], groups, f"{name}/")
        return Measured(figures, details)

    def _class_embeddings(self, predict: Predict) -> Tensor:
        """All ranks embed all prompts: a forward under ZeRO-3 needs every rank."""
        batches = prompt_batches(self.tokenize(self.prompts))
        embedded = torch.cat([predict(batch)["text_embedding"].float().cpu() for batch in batches])
        return class_embeddings(embedded, len(self.classes))
