"""Weighted nearest neighbours: the quality of features, without training anything.

Legend: B queries, T training samples, D width, C classes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluate.base import Measured, Predict, Sweep
from pipeline.evaluate.classification import topk_accuracy
from pipeline.evaluate.collect import collect, labelled

CHUNK = 1024  # queries scored at a time


def knn_scores(
    queries: Float[Tensor, "b d"],
    features: Float[Tensor, "t d"],
    labels: Int[Tensor, " t"],
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[Tensor, "b c"]:
    """Votes of the k nearest training samples by cosine, weighted by exp(cosine / temperature) (Wu et al. 2018)."""
    features = F.normalize(features.float(), dim=-1)
    scores = []
    queries = F.normalize(queries.float(), dim=-1)
    for start in range(0, len(queries), CHUNK):
        chunk = queries[start : start + CHUNK]
        cosine, nearest = (chunk @ features.T).topk(min(k, len(features)), dim=1)
        votes = torch.zeros(len(chunk), num_classes)
        scores.append(votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp()))
    return torch.cat(scores)


class KnnEvaluation:
    """`<set>/knn_top1` from a stage's `features` and `labels`; neighbours are samples of the training set."""

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        self.k = k
        self.temperature = temperature

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        if not names:
            return Measured({})
        train = labelled(collect(predict, sweep("train"), ("features", "labels")))
        if not len(train.get("labels", ())):
            return Measured({})
        num_classes = int(train["labels"].max()) + 1
        figures = {}
        for name in names:
            queries = labelled(collect(predict, sweep(name), ("features", "labels")))
            if len(queries.get("labels", ())):
                scores = knn_scores(
                    queries["features"],
                    train["features"],
                    train["labels"],
                    num_classes,
                    k=self.k,
                    temperature=self.temperature,
                )
                figures[f"{name}/knn_top1"] = topk_accuracy(scores.argmax(1, keepdim=True), queries["labels"], 1)
        return Measured(figures)
