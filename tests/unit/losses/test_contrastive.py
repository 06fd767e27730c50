"""The contrastive losses: open_clip's numbers, exact gradients on several ranks, absent pairs truly absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.losses.contrastive import clip_loss, siglip_loss

KINDS = ("clip", "siglip")


def pairs(num: int = 12) -> tuple[Tensor, ...]:
    """Images, texts, log scale, bias."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, num, 8, generator=generator).unbind(0)
    leaves = (images, texts, torch.full((1,), 2.0), torch.full((1,), -3.0))
    return tuple(tensor.requires_grad_() for tensor in leaves)


def total(
    kind: str, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, chunk: int = 5
) -> Tensor:
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    if kind == "clip":
        each = clip_loss(images, texts, weight, scale.exp(), chunk=chunk) + 0 * bias
    else:
        each = siglip_loss(images, texts, weight, scale.exp(), bias, chunk=chunk)
    return (weight * each).sum()


def gradients(kind: str, weight: Tensor, rows: slice = slice(None), chunk: int = 5) -> tuple[float, list[Tensor]]:
    """Loss and gradients of this rank's rows; of everything, by default."""
    leaves = pairs(len(weight))
    images, texts, scale, bias = leaves
    loss = total(kind, images[rows], texts[rows], scale, bias, weight[rows], chunk)
    return loss.item(), list(torch.autograd.grad(loss, leaves))


def theirs(kind: str, leaves: tuple[Tensor, ...]) -> Tensor:
    from open_clip.loss import ClipLoss, SigLipLoss

    images, texts, scale, bias = leaves
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    if kind == "clip":
        return ClipLoss()(images, texts, scale.exp()) + 0 * bias.sum()
    return SigLipLoss()(images, texts, scale.exp(), bias)


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_open_clips_loss(kind: str, chunk: int) -> None:
    loss, ours = gradients(kind, torch.ones(12), chunk=chunk)
    leaves = pairs()
    peer = theirs(kind, leaves)
    assert loss / 12 == pytest.approx(peer.item(), rel=1e-6)
    for gradient, expected in zip(ours, torch.autograd.grad(peer, leaves), strict=True):
        assert (gradient / 12 - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    """In float64 through the same rule, pairs weighted unequally as an upstream gradient would."""
    images, texts, scale, bias = (tensor.detach() for tensor in pairs(6))
    weight = torch.tensor([1.0, 1, 0, 1, 1, 1])
    _, ours = gradients(kind, weight)
    step = 1e-2
    for which in (2, 3):
        ends = []
        for sign in (1, -1):
            moved = [images, texts, scale, bias]
            moved[which] = moved[which] + sign * step
            i, t, s, b = pairs(6)[0].detach(), pairs(6)[1].detach(), moved[2], moved[3]
            ends.append(total(kind, i, t, s, b, weight).item())
        expected = (ends[0] - ends[1]) / (2 * step)
        assert ours[which].item() == pytest.approx(expected, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_pairs_are_nobodys_negatives(kind: str) -> None:
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1])
    loss, (images, texts, _, _) = gradients(kind, weight)
    there = weight > 0
    own_images, own_texts, scale, bias = pairs(6)
    own_loss = total(kind, own_images[there], own_texts[there], scale, bias, torch.ones(4))
    assert loss == pytest.approx(own_loss.item(), rel=1e-6)
    assert not images[~there].any()
    assert not texts[~there].any()
    assert images[there].any(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_nothing_and_a_batch_of_one_have_a_finite_loss(kind: str) -> None:
    assert gradients(kind, torch.zeros(3))[0] == 0
    alone = gradients(kind, torch.ones(1))
    assert kind == "siglip" or alone[0] == pytest.approx(0, abs=1e-6)
    assert all(g.isfinite().all() for g in [*gradients(kind, torch.zeros(3))[1], *alone[1]])


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def largest_of_a_step(kind: str, num: int, chunk: int = 3) -> int:
    """Of loss and backward of this many pairs of this rank."""
    leaves = pairs(num)
    with Largest() as largest:
        total(kind, *leaves, torch.ones(num), chunk).backward()
    return largest.elements


def _rank(rank: int, world_size: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    weight = torch.load(f"{folder}/weight.pt")
    share = len(weight) // world_size
    results = gradients(kind, weight, slice(rank * share, (rank + 1) * share), chunk=3)
    torch.save((*results, largest_of_a_step(kind, share)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(folder: Path, kind: str, weight: Tensor, world_size: int) -> list[Any]:
    torch.save(weight, folder / "weight.pt")
    # Forked, since importing torch anew takes seconds; no thread but this one runs here.
    assert os.environ["OMP_NUM_THREADS"] == "1"
    mp.start_processes(_rank, args=(world_size, str(folder), kind), nprocs=world_size, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.mark.parametrize("absent", [(), (1, 7)])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_on_several_ranks_are_the_full_batchs(
    tmp_path: Path, kind: str, world_size: int, absent: tuple[int]
) -> None:
    weight = torch.ones(12)
    weight[list(absent)] = 0
    parts = on_ranks(tmp_path, kind, weight, world_size)
    loss, expected = gradients(kind, weight)
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-6)
    for i, gradient in enumerate(expected):
        summed = torch.stack([part[1][i] for part in parts]).sum(0)
        assert (summed - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_grows_with_the_number_of_ranks(tmp_path: Path, kind: str) -> None:
    """32 pairs a rank of width 8: what travels is 32 x 20 and 32 x 3 scores are held at a time, not 32 x 32 or more."""
    largest = []
    for world_size in (2, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        largest.append({part[2] for part in on_ranks(folder, kind, torch.ones(32 * world_size), world_size)})
    assert largest[0] == largest[1] == {32 * (2 * 8 + 4)}
    assert largest_of_a_step(kind, 32, chunk=32) == 32 * 32, "the measure sees scores that aren't cut"
