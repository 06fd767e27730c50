"""Evaluation of two-tower models: zero-shot classification and retrieval, from one sweep over each set."""

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

    Every set is measured with its own classes, which `details` lists as `<set>/classes`.

    The stage predicts `image_embedding` and `text_embedding` [B,E] for whatever a batch holds, `labels` (-1 where a
    sample has none), and `text`, from which equal captions are recognised; an empty caption counts as none.
    """

    def __init__(
        self,
        classes: Mapping[str, Sequence[str]],
        templates: Sequence[str],
        tokenizer: Tokenizer,
        *,
        retrieval: bool = True,
    ) -> None:
        """Takes the class names used in prompts, by set; the key "" stands for all sets that aren't listed."""
        self.classes = {name: tuple(names) for name, names in classes.items()}
        self.templates = tuple(templates)
        self.tokenizer = tokenizer
        self.retrieval = retrieval

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        figures: dict[str, float] = {}
        details: dict[str, Any] = {}
        if not names:
            return Measured({})
        class_lists = dict.fromkeys(map(self._classes_of, names))  # a list that several sets share is embedded once
        embeddings = {classes: self._class_embeddings(predict, classes) for classes in class_lists if classes}
        for name in names:
            samples = collect(predict, sweep(name), ("image_embedding", "text_embedding", "labels", "text"))
            with_label = labelled(samples)
            if (classes := self._classes_of(name)) and with_label:
                _check_labels(with_label["labels"], classes, name)
                best = best_classes(with_label["image_embedding"].float() @ embeddings[classes].T)
                zeroshot, extras = classification_figures(best, with_label["labels"], classes, f"{name}/zeroshot_")
                figures |= zeroshot
                details |= {f"{name}/classes": extras.pop("classes"), **extras}
            if self.retrieval and "text_embedding" in samples:
                retrieval, extras = self._retrieve(samples, name)
                figures |= retrieval
                details |= extras
        return Measured(figures, details)

    def _retrieve(self, samples: dict[str, Tensor], name: str) -> tuple[dict[str, float], dict[str, Any]]:
        blank = self.tokenizer([""])[0]
        captioned = (samples["text"] != blank).any(1)
        if int(captioned.sum()) == 0:
            return {}, {}
        rows = {key: value[captioned] for key, value in samples.items()}
        images, texts, groups = rows["image_embedding"], rows["text_embedding"], text_groups(rows["text"])
        captions = dict(zip(rows["ids"].tolist(), rows["text"], strict=True))
        worst = [
            pair._asdict()
            | {"caption": self._caption(captions[pair.id]), "found": self._caption(captions[pair.found_id])}
            for pair in worst_pairs(images, texts, groups, rows["ids"])
        ]
        return retrieval_figures(images, texts, groups, f"{name}/"), {f"{name}/retrieval_worst": worst}

    def _caption(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens)

    def _classes_of(self, name: str) -> tuple[str, ...]:
        return self.classes.get(name, self.classes.get("", ()))

    def _class_embeddings(self, predict: Predict, classes: tuple[str, ...]) -> Tensor:
        """Embeddings [C,E] of the classes on every rank; each rank embeds its share of the prompts."""
        tokens = self.tokenizer(prompts(classes, self.templates))
        embedded = collect(predict, prompt_batches(tokens), ("text_embedding",))["text_embedding"]
        return class_embeddings(torch.as_tensor(embedded).float(), len(classes))


def _check_labels(labels: Int[Tensor, " b"], classes: Sequence[str], name: str) -> None:
    """Raise DataError for a label beyond the set's classes. All ranks raise alike, since all hold the same labels."""
    if int(labels.max()) >= len(classes):
        raise DataError(
            f"label {int(labels.max())}, but the data name {len(classes)} classes",
            where=f"evaluation set {name!r}",
            fix="prepare the set with the whole list of its classes",
        )
