"""MixUp and CutMix between neighbours: timm's arithmetic, and the same pairs on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.mixing import Mixing, draw_mixing, mix_images, mix_labels

SEEDS = torch.arange(400) * 7919
SIZE = (24, 40)


def draw(seeds: Tensor = SEEDS, *, mixup: float = 0.8, cutmix: float = 1.0, weight: Tensor | None = None) -> Mixing:
    return draw_mixing(seeds, torch.ones(len(seeds)) if weight is None else weight, SIZE, mixup=mixup, cutmix=cutmix)


def test_a_part_of_the_batch_mixes_as_the_whole() -> None:
    images, labels = torch.randn(12, 3, *SIZE), torch.arange(12) % 5
    whole = draw(SEEDS[:12])
    for start in (0, 4, 10):
        rows = slice(start, start + 2)
        part = draw(SEEDS[rows])
        assert torch.equal(mix_images(images[rows], part), mix_images(images, whole)[rows])
        assert torch.equal(mix_labels(labels[rows], part, 5), mix_labels(labels, whole, 5)[rows])


def test_images_and_labels_are_mixed_as_timm_mixes_pairs() -> None:
    """timm's `Mixup` in its mode `pair`, given the same shares and boxes."""
    from timm.data import mixup as timm_mixup

    class Given(timm_mixup.Mixup):
        def _params_per_elem(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
            return shares[::-1].copy(), cuts[::-1].copy()

    mixing = draw(SEEDS[:8])
    shares, cuts = mixing.share.double().numpy(), mixing.cut.numpy()
    assert set(cuts.tolist()) == {True, False}
    boxes = iter([(tuple(box), share) for box, share in zip(mixing.boxes.tolist(), shares, strict=True)][::-1])
    boxes = iter([b for b, cut in zip(list(boxes), cuts[::-1], strict=True) if cut])
    images, labels = torch.randn(8, 3, *SIZE, dtype=torch.float64), torch.arange(8)
    # timm pairs i with the one as far from the end; so the last pair of ours comes first.
    order = torch.tensor([6, 4, 2, 0, 1, 3, 5, 7])
    theirs = Given(mixup_alpha=0.8, cutmix_alpha=1.0, mode="pair", label_smoothing=0.1, num_classes=10)
    original = timm_mixup.cutmix_bbox_and_lam
    timm_mixup.cutmix_bbox_and_lam = lambda *_, **__: next(boxes)
    try:
        expected = images[order].clone()
        share = theirs._mix_pair(expected)
    finally:
        timm_mixup.cutmix_bbox_and_lam = original
    targets = timm_mixup.mixup_target(labels[order], 10, share, smoothing=0.1)
    back = order.argsort()
    torch.testing.assert_close(mix_images(images, mixing), expected[back], rtol=1e-6, atol=1e-6)
    smoothed = 0.9 * mix_labels(labels, mixing, 10) + 0.1 / 10
    torch.testing.assert_close(smoothed, targets[back].float(), rtol=1e-5, atol=1e-6)


def test_shares_are_beta_and_boxes_timms() -> None:
    from scipy.stats import beta, kstest
    from timm.data.mixup import rand_bbox

    seeds = torch.arange(8000)
    assert kstest(draw(seeds, cutmix=0).share.numpy(), beta(0.8, 0.8).cdf).pvalue > 1e-3
    both = draw(seeds)
    assert abs(both.cut.float().mean() - 0.5) < 0.03
    cut = draw(seeds, mixup=0)
    assert cut.cut.all()
    top, bottom, left, right = cut.boxes.T
    covered = (bottom - top) * (right - left) / (SIZE[0] * SIZE[1])
    torch.testing.assert_close(1 - covered, cut.share)
    np.random.seed(0)
    drawn = [rand_bbox((3, *SIZE), lam) for lam in np.random.beta(1, 1, 4000)]
    theirs = np.array([(b - t) * (r - left) / (SIZE[0] * SIZE[1]) for t, b, left, r in drawn])
    from scipy.stats import ks_2samp

    assert ks_2samp(theirs, covered.numpy()).pvalue > 1e-3
    assert ks_2samp([b[0] for b in drawn], top.numpy()).pvalue > 1e-3


def test_absent_samples_mix_with_nobody() -> None:
    weight = torch.ones(400)
    weight[5] = 0
    mixing = draw(weight=weight)
    images = torch.randn(400, 3, *SIZE)
    mixed = mix_images(images, mixing)
    assert torch.equal(mixed[4:6], images[4:6])
    assert mix_labels(torch.zeros(400, dtype=torch.long), mixing, 3)[4].tolist() == [1, 0, 0]
    assert not torch.equal(mixed[6:8], images[6:8])


def test_an_odd_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 7 samples"):
        draw(SEEDS[:7])
