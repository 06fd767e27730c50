"""The contrastive loss: open_clip's numbers, exact gradients on several ranks, absent pairs truly absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from pipeline.losses.contrastive import clip_loss


def pairs(num: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, num, 8, generator=generator).unbind(0)
    return images.requires_grad_(), texts.requires_grad_(), torch.full((1,), 2.0).requires_grad_()


def total(images: Tensor, texts: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    each = clip_loss(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), weight, scale.exp())
    return (weight * each).sum()


def gradients(weight: Tensor, rows: slice = slice(None)) -> tuple[float, list[Tensor]]:
    """Loss and gradients of this rank's rows; of everything, by default."""
    images, texts, scale = pairs(len(weight))
    loss = total(images[rows], texts[rows], scale, weight[rows])
    return loss.item(), list(torch.autograd.grad(loss, (images, texts, scale)))


def test_equals_open_clips_loss() -> None:
    from open_clip.loss import ClipLoss

    images, texts, scale = pairs()
    theirs = ClipLoss()(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), scale.exp())
    torch.testing.assert_close(total(images, texts, scale, torch.ones(12)) / 12, theirs)


def test_absent_pairs_are_nobodys_negatives() -> None:
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1])
    loss, (images, texts, _) = gradients(weight)
    there = weight > 0
    own_images, own_texts, scale = pairs(6)
    own_loss = total(own_images[there], own_texts[there], scale, torch.ones(4))
    assert loss == pytest.approx(own_loss.item(), rel=1e-6)
    assert not images[~there].any()
    assert not texts[~there].any()
    assert images[there].any(1).all()


def test_a_batch_of_nothing_and_a_batch_of_one_have_a_finite_loss() -> None:
    assert gradients(torch.zeros(3))[0] == 0
    assert gradients(torch.ones(1))[0] == pytest.approx(0, abs=1e-6)
    assert all(g.isfinite().all() for g in gradients(torch.zeros(3))[1])


def _rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    weight = torch.load(f"{folder}/weight.pt")
    share = len(weight) // world_size
    torch.save(gradients(weight, slice(rank * share, (rank + 1) * share)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("absent", [(), (1, 7)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_on_several_ranks_are_the_full_batchs(tmp_path: Path, world_size: int, absent: tuple[int]) -> None:
    weight = torch.ones(12)
    weight[list(absent)] = 0
    torch.save(weight, tmp_path / "weight.pt")
    # Forked, since importing torch anew takes seconds; no thread but this one runs here.
    assert os.environ["OMP_NUM_THREADS"] == "1"
    mp.start_processes(_rank, args=(world_size, str(tmp_path)), nprocs=world_size, start_method="fork")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    loss, expected = gradients(weight)
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-6)
    for i, gradient in enumerate(expected):
        summed = torch.stack([part[1][i] for part in parts]).sum(0)
        assert (summed - gradient).abs().max() <= 1e-6 * gradient.abs().max()
