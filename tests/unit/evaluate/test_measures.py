"""Measures on plain tensors, beside other people's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.evaluate.classification import best_classes, classification_figures, confusion, topk_accuracy
from pipeline.evaluate.knn import knn_scores
from pipeline.evaluate.probe import choose_head
from pipeline.evaluate.retrieval import ranks_of_right_answers, retrieval_figures, text_groups, worst_pairs
from pipeline.evaluate.zeroshot import class_embeddings, prompts


def test_topk_and_confusion_equal_sklearns() -> None:
    from sklearn.metrics import confusion_matrix, top_k_accuracy_score

    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(200, 7, generator=generator), torch.randint(0, 7, (200,), generator=generator)
    best = best_classes(scores)
    for k in (1, 5):
        assert topk_accuracy(best, labels, k) == pytest.approx(top_k_accuracy_score(labels, scores, k=k))
    assert confusion(best[:, 0], labels, 7) == confusion_matrix(labels, scores.argmax(1)).tolist()


def test_figures_leave_out_top5_where_it_says_nothing() -> None:
    best = best_classes(torch.eye(3))
    figures, details = classification_figures(best, torch.arange(3), ("a", "b", "c"), "heldout/")
    assert figures == {"heldout/top1": 1.0, "heldout/mean_per_class": 1.0}
    assert details["heldout/confusion"] == torch.eye(3).int().tolist()
    assert details["classes"] == ["a", "b", "c"]


def test_knn_equals_sklearns_weighted_neighbours() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(300, 6, generator=generator), torch.randn(50, 6, generator=generator)
    labels = torch.randint(0, 4, (300,), generator=generator)
    ours = knn_scores(queries, train, labels, 4, k=15, temperature=0.1)
    peer = KNeighborsClassifier(15, metric="cosine", weights=lambda d: torch.from_numpy((1 - d) / 0.1).exp().numpy())
    theirs = torch.from_numpy(peer.fit(train.numpy(), labels.numpy()).predict_proba(queries.numpy())).float()
    torch.testing.assert_close(ours / ours.sum(1, keepdim=True), theirs, rtol=1e-3, atol=1e-5)


def test_knn_with_fewer_samples_than_neighbours() -> None:
    scores = knn_scores(torch.eye(2), torch.eye(2), torch.tensor([1, 0]), 2, k=20)
    assert scores.argmax(1).tolist() == [1, 0]


def test_retrieval_ranks_equal_a_sort_of_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 40, 5, generator=generator).unbind(0)
    scores = images @ texts.T
    order = scores.argsort(1, descending=True)
    expected = (order == torch.arange(40).unsqueeze(1)).nonzero()[:, 1]
    assert torch.equal(ranks_of_right_answers(images, texts, torch.arange(40)), expected)
    figures = retrieval_figures(images, texts, torch.arange(40), "v/")
    assert figures["v/retrieval_i2t_r5"] == pytest.approx((expected < 5).float().mean().item())


def test_retrieval_figures_are_those_of_open_clips_own_function() -> None:
    from open_clip_train.train import get_clip_metrics

    images, texts = torch.randn(2, 57, 6, generator=torch.Generator().manual_seed(1)).unbind(0)
    theirs = get_clip_metrics(images, texts, torch.tensor(10.0))
    ours = retrieval_figures(images, texts, torch.arange(57), "v/")
    assert len(ours) == len(theirs) == 10
    for way, name in (("i2t", "image_to_text"), ("t2i", "text_to_image")):
        for k in (1, 5, 10):
            assert ours[f"v/retrieval_{way}_r{k}"] == theirs[f"{name}_R@{k}"]
        for rank in ("mean_rank", "median_rank"):
            assert ours[f"v/retrieval_{way}_{rank}"] == pytest.approx(theirs[f"{name}_{rank}"])


def test_the_worst_pairs_are_those_whose_image_is_found_last() -> None:
    images = torch.eye(4)
    texts = images[[0, 1, 3, 2]] + 0.1 * images
    worst = worst_pairs(images, texts, torch.arange(4), torch.tensor([7, 8, 9, 10]))
    assert [(pair.id, pair.rank, pair.found_id) for pair in worst] == [(9, 2, 10), (10, 2, 9)]
    assert worst[0].found_cosine > worst[0].cosine


def test_equal_captions_are_right_answers_for_one_another() -> None:
    text = torch.tensor([[5, 1], [7, 2], [5, 1]])
    groups = text_groups(text)
    assert groups[0] == groups[2] != groups[1]
    images = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]]), dim=-1)
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert ranks_of_right_answers(images, texts, groups).tolist() == [0, 0, 0]
    assert ranks_of_right_answers(texts, images, groups).tolist() == [0, 0, 0]
    wrong = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert ranks_of_right_answers(images, wrong, groups).tolist() == [1, 2, 1]


def test_class_embeddings_equal_open_clips_classifier() -> None:
    from open_clip import build_zero_shot_classifier

    class Model:
        def encode_text(self, texts: torch.Tensor, normalize: bool) -> torch.Tensor:
            assert normalize
            return F.normalize(embed(texts), dim=-1)

    def embed(texts: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.sin(texts.float() * (i + 1)).sum(1) for i in range(6)], dim=1)

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[ord(c) for c in text.ljust(40)] for text in texts])

    classes, templates = ("cat", "dog", "ox"), ("a photo of a {}.", "{}", "my {}")
    theirs = build_zero_shot_classifier(Model(), tokenize, classes, templates)
    ours = class_embeddings(embed(tokenize(prompts(classes, templates))), 3)
    torch.testing.assert_close(ours.T, theirs)


@pytest.mark.parametrize("templates", [(), ("a photo",), ("{} and {}",)])
def test_templates_without_a_place_for_the_name_are_refused(templates: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="template"):
        prompts(("cat",), templates)


def test_names_with_braces_are_taken_as_they_are() -> None:
    assert prompts(("{0}",), ("a {}",)) == ["a {0}"]


def test_the_best_head_is_chosen_and_the_first_of_equals() -> None:
    labels = torch.tensor([0, 1, 1])
    best = torch.tensor([[[1], [0], [0]], [[1], [1], [1]], [[0], [1], [1]]])
    assert choose_head(best, labels) == 1
