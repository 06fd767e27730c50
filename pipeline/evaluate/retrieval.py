"""Retrieval: the text of an image among all texts, and the image of a text among all images.

Legend: B pairs, E width of an embedding, L tokens of a text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 1024  # rows scored at a time, so that memory stays chunk x B
RECALLS = (1, 5, 10)


def text_groups(text: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
    """A number per pair, equal for pairs with the same text, which count as right answers for one another."""
    groups: Tensor = torch.unique(text, dim=0, return_inverse=True)[1]
    return groups


def ranks_of_right_answers(
    queries: Float[Tensor, "b e"], answers: Float[Tensor, "b e"], groups: Int[Tensor, " b"]
) -> Int[Tensor, " b"]:
    """For each query, how many wrong answers score higher than the best right one (0: the right one comes first)."""
    ranks = []
    for start in range(0, len(queries), CHUNK):
        rows = slice(start, start + CHUNK)
        scores = queries[rows].float() @ answers.float().T
        right = groups[rows].unsqueeze(1) == groups.unsqueeze(0)
        best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
        ranks.append(((scores > best) & ~right).sum(1))
    return torch.cat(ranks)


def retrieval_figures(
    images: Float[Tensor, "b e"], texts: Float[Tensor, "b e"], groups: Int[Tensor, " b"], prefix: str
) -> dict[str, float]:
    """`<prefix>retrieval_{i2t,t2i}_r{1,5,10}`: the share of queries with a right answer among the first 1, 5, 10; and
    `..._mean_rank`, `..._median_rank` of the best right answer, counted from 1.
    """
    figures = {}
    for way, ranks in (
        ("i2t", ranks_of_right_answers(images, texts, groups)),
        ("t2i", ranks_of_right_answers(texts, images, groups)),
    ):
        for k in RECALLS:
            figures[f"{prefix}retrieval_{way}_r{k}"] = (ranks < k).double().mean().item()
        figures[f"{prefix}retrieval_{way}_mean_rank"] = ranks.double().mean().item() + 1
        figures[f"{prefix}retrieval_{way}_median_rank"] = ranks.double().quantile(0.5).floor().item() + 1
    return figures


class WorstPair(NamedTuple):
    """A caption whose image is ranked low."""

    id: int  # of the sample
    rank: int  # of the best right image, 1 = first
    found_id: int  # sample whose image is ranked first instead
    cosine: float  # between the caption and its image
    found_cosine: float  # and between the caption and the image ranked first


def worst_pairs(
    images: Float[Tensor, "b e"],
    texts: Float[Tensor, "b e"],
    groups: Int[Tensor, " b"],
    ids: Int[Tensor, " b"],
    most: int = 10,
) -> list[WorstPair]:
    """The captions whose images are ranked lowest, the worst first; those whose image comes first aren't listed."""
    ranks = ranks_of_right_answers(texts, images, groups)
    worst = ranks.argsort(descending=True, stable=True)[:most]
    scores = texts[worst].float() @ images.float().T
    best = scores.argmax(1)
    own_cosines = scores.gather(1, worst.unsqueeze(1)).squeeze(1)
    return [
        WorstPair(int(ids[i]), int(ranks[i]) + 1, int(ids[b]), round(float(c), 4), round(float(s[b]), 4))
        for i, b, c, s in zip(worst, best, own_cosines, scores, strict=True)
        if ranks[i] > 0
    ]
