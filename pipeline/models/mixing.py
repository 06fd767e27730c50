"""MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019) between neighbouring samples.

Samples 2i and 2i + 1 of a batch are mixed with each other. Ranks and micro batches take even slices of the global
batch, so the pairs, and what is drawn for them from the first sample's seed, are the same for any number of ranks.

Legend: B samples, Q = B / 2 pairs, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.noise import uniform


class Mixing(NamedTuple):
    """How each pair is mixed."""

    share: Float[Tensor, " q"]  # of itself that each sample keeps
    boxes: Int[Tensor, "q 4"]  # top, bottom, left, right of what is cut and exchanged
    cut: Bool[Tensor, " q"]  # CutMix rather than MixUp


def draw_mixing(
    seeds: Int[Tensor, " b"],
    weight: Float[Tensor, " b"],
    size: tuple[int, int],
    *,
    mixup: float,
    cutmix: float,
) -> Mixing:
    """Draw as timm's `Mixup` does at switch probability one half: Beta(a, a) shares, boxes around uniform points.

    A pair with an absent sample (weight 0) is left unmixed.

    Args:
        seeds: the samples' seeds.
        weight: the samples' weights.
        size: height and width of the images.
        mixup: MixUp's a; 0 turns it off.
        cutmix: CutMix's a; 0 turns it off.

    Raises:
        ConfigError: the batch has an odd number of samples.
    """
    if len(seeds) % 2:
        raise ConfigError(
            f"mixup and cutmix work on pairs, and a micro batch has {len(seeds)} samples",
            where="engine.micro_batch",
            fix="choose a global batch and a micro batch of which every rank gets an even number of samples",
        )
    draws = uniform(seeds[::2], "mix", 4).cpu()
    cut = (draws[:, 0] < 0.5) if mixup > 0 and cutmix > 0 else torch.full((len(draws),), cutmix > 0)
    share = torch.where(cut, _beta(draws[:, 1], cutmix), _beta(draws[:, 1], mixup))
    height, width = size
    side = (1 - share).sqrt()
    tall, wide = (height * side).long(), (width * side).long()
    y, x = (draws[:, 2] * height).long(), (draws[:, 3] * width).long()
    top, bottom = (y - tall // 2).clamp(0, height), (y + (tall + 1) // 2).clamp(0, height)
    left, right = (x - wide // 2).clamp(0, width), (x + (wide + 1) // 2).clamp(0, width)
    inside = (bottom - top) * (right - left) / (height * width)
    share = torch.where(cut, 1 - inside, share)
    present = ((weight[::2] > 0) & (weight[1::2] > 0)).cpu()
    boxes = torch.stack([top, bottom, left, right], dim=1) * present.unsqueeze(1)
    share = torch.where(present, share, 1.0)
    device = seeds.device
    return Mixing(share.float().to(device), boxes.to(device), cut.to(device))


def mix_images(images: Float[Tensor, "b 3 h w"], mixing: Mixing) -> Float[Tensor, "b 3 h w"]:
    """The mixed images."""
    height, width = images.shape[2:]
    other = _partners(images)
    share, cut = (_for_both(part).view(-1, 1, 1, 1) for part in (mixing.share, mixing.cut))
    top, bottom, left, right = _for_both(mixing.boxes).view(-1, 4, 1, 1).unbind(1)
    down = torch.arange(height, device=images.device).view(1, -1, 1)
    across = torch.arange(width, device=images.device).view(1, 1, -1)
    inside = ((down >= top) & (down < bottom) & (across >= left) & (across < right)).unsqueeze(1)
    share = share.to(images.dtype)
    return torch.where(cut, torch.where(inside, other, images), share * images + (1 - share) * other)


def mix_labels(labels: Int[Tensor, " b"], mixing: Mixing, num_classes: int) -> Float[Tensor, "b c"]:
    """Each sample's class probabilities after mixing."""
    onehot = torch.nn.functional.one_hot(labels, num_classes).float()
    share = _for_both(mixing.share).unsqueeze(1)
    return share * onehot + (1 - share) * _partners(onehot)


def _for_both(of_pairs: Tensor) -> Tensor:
    return of_pairs.repeat_interleave(2, dim=0)


def _partners(samples: Tensor) -> Tensor:
    """For each sample, the other one of its pair."""
    return samples.view(-1, 2, *samples.shape[1:]).flip(1).flatten(0, 1)


def _beta(quantile: Tensor, a: float) -> Tensor:
    """Beta(a, a) at the given quantiles: equal on any device, and one draw per value."""
    if a <= 0:
        return torch.ones_like(quantile)
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    return torch.from_numpy(betaincinv(a, a, quantile.numpy()))
