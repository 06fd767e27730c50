"""What a two-tower model is worth: zero-shot classification and retrieval, from one sweep over each set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluate.base import Measured, Predict, Sweep
from pipeline.evaluate.classification import best_classes, classification_figures
from pipeline.evaluate.collect import collect, labelled
from pipeline.evaluate.retrieval import retrieval_figures, text_groups, worst_pairs
from pipeline.evaluate.zeroshot import class_embeddings, prompt_batches, prompts


@runtime_checkable  # tests check annotations at run time
class Tokenizer(Protocol):
    """Captions to tokens [B,L], and back."""

    def __call__(self, texts: list[str]) -> Int[Tensor, "b l"]: ...

    def decode(self, tokens: Int[Tensor, " l"]) -> str: ...


class ImageTextEvaluation:
    """`<set>/zeroshot_top1` and so on where samples have labels, `<set>/retrieval_*` where they have captions.

    Every set is measured by its own classes, which `details` tells as `<set>/classes`.

    The stage predicts `image_embedding` and `text_embedding` [B,E] for what a batch holds, `labels` (-1 where a sample
    has none), and `text` for telling equal captions; an empty caption is none.
    """

    def __init__(
        self,
        classes: Mapping[str, Sequence[str]],
        templates: Sequence[str],
        tokenizer: Tokenizer,
        *,
        retrieval: bool = True,
    ) -> None:
        """Takes what each set's classes are called in prompts; "" stands for all sets that aren't named."""
        self.classes = {name: tuple(own) for name, own in classes.items()}
        self.templates = tuple(templates)
        self.tokenizer = tokenizer
        self.retrieval = retrieval

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        figures: dict[str, float] = {}
        details: dict[str, Any] = {}
        if not names:
            return Measured({})
        by_class = {
            own: self._class_embeddings(predict, own) for own in dict.fromkeys(map(self._classes_of, names)) if own
        }
        for name in names:
            found = collect(predict, sweep(name), ("image_embedding", "text_embedding", "labels", "text"))
            known = labelled(found)
            if (classes := self._classes_of(name)) and known:
                _check_labels(known["labels"], classes, name)
                best = best_classes(known["image_embedding"].float() @ by_class[classes].T)
                own, own_details = classification_figures(best, known["labels"], classes, f"{name}/zeroshot_")
                figures |= own
                details |= {f"{name}/classes": own_details.pop("classes"), **own_details}
            if self.retrieval and "text_embedding" in found:
                own, own_details = self._retrieve(found, name)
                figures |= own
                details |= own_details
        return Measured(figures, details)

    def _retrieve(self, found: dict[str, Tensor], name: str) -> tuple[dict[str, float], dict[str, Any]]:
        blank = self.tokenizer([""])[0]
        captioned = (found["text"] != blank).any(1)
        if int(captioned.sum()) == 0:
            return {}, {}
        rows = {key: value[captioned] for key, value in found.items()}
        images, texts, groups = rows["image_embedding"], rows["text_embedding"], text_groups(rows["text"])
        captions = dict(zip(rows["ids"].tolist(), rows["text"], strict=True))
        worst = [
            {**pair._asdict(), "caption": self._told(captions[pair.id]), "found": self._told(captions[pair.found_id])}
            for pair in worst_pairs(images, texts, groups, rows["ids"])
        ]
        return retrieval_figures(images, texts, groups, f"{name}/"), {f"{name}/retrieval_worst": worst}

    def _told(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens)

    def _classes_of(self, name: str) -> tuple[str, ...]:
        return self.classes.get(name, self.classes.get("", ()))

    def _class_embeddings(self, predict: Predict, classes: tuple[str, ...]) -> Tensor:
        """Each rank embeds its share of the prompts; all get all classes."""
        tokens = self.tokenizer(prompts(classes, self.templates))
        embedded = collect(predict, prompt_batches(tokens), ("text_embedding",))["text_embedding"]
        return class_embeddings(torch.as_tensor(embedded).float(), len(classes))


def _check_labels(labels: Int[Tensor, " b"], classes: Sequence[str], name: str) -> None:
    """Raise DataError for a label beyond the set's own classes; the same on all ranks, which hold the same labels."""
    if int(labels.max()) >= len(classes):
        raise DataError(
            f"label {int(labels.max())}, but the data name {len(classes)} classes",
            where=f"evaluation set {name!r}",
            fix="prepare the set with the whole list of its classes",
        )
