"""ViTDet: folded relative positions against none, a bias of all pairs and FlexAttention; COCO figures.

On a CPU a B trunk's training step at 512 pixels; on a GPU B, L and H at 1024, forward and backward in bf16, with peak
memory. The sides of a pair compute the same (or, against none, the same but for the relative positions).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Comparison, Contender, Goal, Work, compare
from pipeline.models import windows
from pipeline.models.attention import attend
from pipeline.models.config import SIZES, ModelConfig
from pipeline.models.vit import ViT

COCO_IMAGES, COCO_CLASSES = 5000, 80
SLOWEST = {"B": 0.77, "L": 0.83, "H": 0.91}
"""Least ratio of the time without relative positions over ours: 30% slower for B, 10% for H, between them for L."""


def run(pairs: int) -> list[Comparison]:
    """`vitdet-<size>-<peer>` for each size and peer there is hardware for, and `coco-figures`."""
    on_gpu = torch.cuda.is_available()
    found = []
    for size in ("B", "L", "H") if on_gpu else ("B",):
        side = 1024 if on_gpu else 512
        found.append(against("none", size, side, pairs, Goal(ratio_min=SLOWEST[size])))
        found.append(against("materialised", size, side, pairs, Goal()))
        if on_gpu:  # it has no backward pass on CPUs
            found.append(against("flex", size, side, pairs, Goal()))
    return [*found, coco(pairs)]


def against(peer: str, size: str, side: int, pairs: int, goal: Goal) -> Comparison:
    """Ours against another way to have relative positions, or none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = trunk(size, side, relative=True).to(device, torch.bfloat16)
    theirs = ours if peer != "none" else trunk(size, side, relative=False).to(device, torch.bfloat16)
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    peaks: dict[str, float] = {}

    def near(mine: Tensor, other: Tensor) -> bool:
        """Both went through the same weights; without relative positions only the size can be compared."""
        if peer == "none":
            return mine.shape == other.shape and bool(torch.isfinite(mine).all())
        return bool((mine - other).abs().max() <= 0.05 * other.abs().max())

    return compare(
        f"vitdet-{size}-{peer}",
        f"forward and backward of a ViTDet-{size} trunk, one image of {side} pixels, bf16, on {device.type}",
        Contender("folded", functools.partial(step, ours, images, None, peaks, "folded")),
        Contender(peer, functools.partial(step, theirs, images, SCORES.get(peer), peaks, peer)),
        check=near,
        pairs=pairs,
        work=Work(1, "images"),
        goal=goal,
        notes={"peak_bytes": peaks, "threads": torch.get_num_threads()},
    )


def trunk(size: str, side: int, *, relative: bool) -> ViT:
    """ViTDet's, with relative positions that aren't zero."""
    torch.manual_seed(0)
    depth = SIZES[size].depth
    model = ViT(
        ModelConfig(
            size=size, image_size=side, position_image_size=224, cls_token=False, final_norm=False, window=14,
            global_blocks=tuple(depth // 4 * quarter - 1 for quarter in (1, 2, 3, 4)), relative_positions=relative,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(
    model: ViT, images: Tensor, scores: Callable[..., Tensor] | None, peaks: dict[str, float], name: str
) -> Tensor:
    """One forward and backward; the features."""
    cuda = images.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with replaced(scores):
        features = model(images).patches
        features.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize()
        peaks[name] = float(torch.cuda.max_memory_allocated())
    found: Tensor = features.detach().float()
    return found


@contextlib.contextmanager
def replaced(scores: Callable[..., Tensor] | None) -> Iterator[None]:
    """Attention of blocks with relative positions computed another way."""
    if scores is None:
        yield
        return
    kept = windows.SpatialAttention.forward

    def forward(self: windows.SpatialAttention, x: Tensor) -> Tensor:
        b, rows, columns, d = x.shape
        q, k, v = self.qkv(x).view(b, rows * columns, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = scores(q, k, v, *relative_parts(self, q, (rows, columns)))
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(b, rows, columns, d))
        return projected

    windows.SpatialAttention.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        windows.SpatialAttention.forward = kept  # type: ignore[method-assign]


def relative_parts(attention: windows.SpatialAttention, q: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What each query [B,H,T] adds to the scores of each row of keys and of each column."""
    assert attention.rel_pos_h is not None
    assert attention.rel_pos_w is not None
    b, h, t, e = q.shape
    placed = q.view(b, h, *grid, e)
    down = torch.einsum("bhrce,rke->bhrck", placed, windows.relative_table(attention.rel_pos_h, grid[0]))
    across = torch.einsum("bhrce,cke->bhrck", placed, windows.relative_table(attention.rel_pos_w, grid[1]))
    return down.reshape(b, h, t, -1), across.reshape(b, h, t, -1)


def materialised(q: Tensor, k: Tensor, v: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """detectron2's way: a bias for every pair of patches."""
    bias = (down.unsqueeze(-1) + across.unsqueeze(-2)).flatten(-2)
    return attend(q, k, v, bias)


def flex(q: Tensor, k: Tensor, v: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """FlexAttention: the kernel looks the products up."""
    columns = across.shape[-1]

    def score(value: Tensor, b: Tensor, h: Tensor, asking: Tensor, key: Tensor) -> Tensor:
        return value + down[b, h, asking, key // columns] + across[b, h, asking, key % columns]

    out: Tensor = compiled_flex()(q, k, v, score_mod=score)
    return out


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


SCORES: dict[str, Callable[..., Tensor]] = {"materialised": materialised, "flex": flex}


def coco(pairs: int) -> Comparison:
    """`coco-figures`: the twelve box figures on synthetic images."""
    from pipeline.evaluate.coco import FIGURES, RECALLS, Truth, coco_figures

    truth, found = synthetic()
    shown = {number: Truth((480, 640), objects) for number, objects in truth.items()}

    def ours() -> list[float]:
        figures, _ = coco_figures(shown, found, COCO_CLASSES, "bbox")
        return [figures[name] for name in (*FIGURES, *RECALLS)]

    return compare(
        "coco-figures",
        f"COCO's box figures of {len(found)} detections in {COCO_IMAGES} images",
        Contender("pipeline.evaluate.coco", ours),
        Contender("pycocotools", functools.partial(with_pycocotools, truth, found)),
        check=lambda mine, other: bool(np.abs(np.subtract(mine, other)).max() <= 1e-6),
        pairs=min(pairs, 2),
        warmup=0,
        clock="cpu",
        work=Work(COCO_IMAGES, "images"),
        goal=Goal(ratio_min=5.0),
    )


def synthetic() -> tuple[dict[int, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Objects and detections about as many as COCO's validation set has, crowds and equal scores among them."""
    draw = np.random.default_rng(0)
    truth: dict[int, list[dict[str, Any]]] = {}
    found: list[dict[str, Any]] = []
    for number in range(COCO_IMAGES):
        objects = []
        for _ in range(int(draw.integers(0, 15))):
            w, h = draw.uniform(5, 250, 2)
            box = [float(v) for v in (draw.uniform(0, 640 - w), draw.uniform(0, 480 - h), w, h)]
            label, crowd = int(draw.integers(COCO_CLASSES)), int(draw.random() < 0.02)
            one = {"image_id": number, "category_id": label, "bbox": box, "area": 0.7 * w * h, "iscrowd": crowd}
            objects.append(one)
            for _ in range(int(draw.integers(0, 4))):
                moved = [max(1.0, float(v)) for v in np.add(box, draw.normal(0, 8, 4))]
                score = round(float(draw.random()), 2)
                found.append({"image_id": number, "category_id": label, "bbox": moved, "score": score})
        for _ in range(20):
            box = [float(v) for v in (*draw.uniform(0, 300, 2), *draw.uniform(5, 180, 2))]
            label, score = int(draw.integers(COCO_CLASSES)), round(float(draw.random() * 0.5), 2)
            found.append({"image_id": number, "category_id": label, "bbox": box, "score": score})
        truth[number] = objects
    return truth, found


def with_pycocotools(truth: dict[int, list[dict[str, Any]]], found: list[dict[str, Any]]) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = [one for there in truth.values() for one in there]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number, "height": 480, "width": 640} for number in truth],
        "annotations": [{**one, "id": i} for i, one in enumerate(objects, start=1)],
        "categories": [{"id": number} for number in range(COCO_CLASSES)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]
