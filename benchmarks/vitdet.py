"""ViTDet: folded relative positions against none, a bias of all pairs and FlexAttention; COCO figures.

On a CPU a B trunk at 512 pixels and the whole detector with it, on a GPU trunks of B, L and H at 1024; training steps
(forward and backward) and inference, in bf16, one image, with peak memory. The sides of a pair compute the same or,
against none, the same but for the relative positions. FlexAttention has no backward pass on CPUs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import rectangles
from benchmarks.harness import Comparison, Contender, Goal, UnequalWork, Work, compare
from pipeline.config import validate
from pipeline.data.batch import Batch
from pipeline.models.trunk import windows
from pipeline.models.trunk.attention import attend
from pipeline.models.trunk.config import SIZES, ModelConfig
from pipeline.models.trunk.vit import ViT
from pipeline.stages.base import DataFacts
from pipeline.stages.vitdet import VitDetOptions, VitDetStage

Way = Literal["train", "infer"]
COCO_IMAGES, COCO_CLASSES = 5000, 80
SLOWEST = {"B": 0.77, "L": 0.83, "H": 0.91}
"""Least ratio of the time without relative positions over ours: 30% slower for B, 10% for H, between them for L."""


def run(pairs: int) -> list[Comparison]:
    """`vitdet-<size>-<train or infer>-<peer>` as there is hardware for, `vitdet-detector-*` and `coco-figures`."""
    on_gpu = torch.cuda.is_available()
    side = 1024 if on_gpu else 512
    results = []
    for size in ("B", "L", "H") if on_gpu else ("B",):
        for way in ("train", "infer"):
            results.append(against("none", size, side, way, pairs, Goal(ratio_min=SLOWEST[size])))
            results.append(against("materialised", size, side, way, pairs, Goal()))
            if on_gpu or way == "infer":
                results.append(against("flex", size, side, way, pairs, Goal()))
    results += [detector(side, way, pairs) for way in ("train", "infer")]
    return [*results, coco(pairs)]


def against(peer: str, size: str, side: int, way: Way, pairs: int, goal: Goal) -> Comparison:
    """Ours against another way to have relative positions, or none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = trunk(size, side, relative=True).to(device, torch.bfloat16)
    theirs = ours if peer != "none" else trunk(size, side, relative=False).to(device, torch.bfloat16)
    images = pixels(side).to(device)

    def near(mine: Tensor, other: Tensor) -> bool:
        """Both went through the same weights; without relative positions only the size can be compared."""
        if peer == "none":
            return mine.shape == other.shape and bool(torch.isfinite(mine).all())
        return bool((mine - other).abs().max() <= 0.05 * other.abs().max())

    return compare(
        f"vitdet-{size}-{way}-{peer}",
        f"{WAYS[way]} of a ViTDet-{size} trunk, one image of {side} pixels, bf16, on {device.type}",
        Contender("folded", functools.partial(pass_through, ours, images, way, None)),
        Contender(peer, functools.partial(pass_through, theirs, images, way, SCORES.get(peer))),
        check=near,
        pairs=pairs,
        work=Work(1, "images"),
        goal=goal,
        notes={
            "peak_bytes": {
                name: peak_bytes(name, size, side, way)
                for name in ("folded", peer)
                if name != "flex" or device.type == "cuda"  # a process's peak would be the compiler's
            },
            "threads": torch.get_num_threads(),
        },
    )


WAYS: dict[Way, str] = {"train": "forward and backward", "infer": "forward"}


def detector(side: int, way: Way, pairs: int) -> Comparison:
    """`vitdet-detector-<way>-none`: ViTDet-B's whole Mask R-CNN, losses or detections, with and without them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image = (pixels(side) * 60 + 128).clamp(0, 255).to(torch.uint8)
    number, objects = torch.zeros(1, dtype=torch.int64), (rectangles(0, side),)
    batch = Batch(number, number, torch.ones(1), 0, image, instances=objects).to(device)

    def work(stage: VitDetStage) -> float:
        if way == "train":
            total = stage.loss(batch).total
            torch.autograd.backward(total)
            stage.zero_grad(set_to_none=True)
            return float(total.detach())
        with torch.no_grad():
            return float(stage.predict(batch)["counts"].sum())

    def stage_of(*, relative: bool) -> VitDetStage:
        torch.manual_seed(0)
        document = {"model": model_of("B", side, relative=relative).model_dump()}
        stage = VitDetStage(validate(VitDetOptions, document, where="benchmark"), DataFacts(("",) * COCO_CLASSES))
        stage.to(device, torch.bfloat16).train(way == "train")
        return stage

    return compare(
        f"vitdet-detector-{way}-none",
        f"{WAYS[way]} of ViTDet-B's Mask R-CNN, one image of {side} pixels, bf16, on {device.type}",
        Contender("folded", functools.partial(work, stage_of(relative=True))),
        Contender("none", functools.partial(work, stage_of(relative=False))),
        check=lambda mine, other: bool(np.isfinite([mine, other]).all()),
        pairs=pairs,
        work=Work(1, "images"),
        notes={"threads": torch.get_num_threads()},
    )


def pixels(side: int) -> Tensor:
    """One normalised image."""
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def model_of(size: str, side: int, *, relative: bool) -> ModelConfig:
    """ViTDet's trunk."""
    depth = SIZES[size].depth
    return ModelConfig(
        size=size, image_size=side, position_image_size=224, position_trained=True, cls_token=False, final_norm=False,
        window=14, global_blocks=tuple(depth // 4 * quarter - 1 for quarter in (1, 2, 3, 4)),
        relative_positions=relative,
    )  # fmt: skip


def trunk(size: str, side: int, *, relative: bool) -> ViT:
    """With relative positions that aren't zero."""
    torch.manual_seed(0)
    model = ViT(model_of(size, side, relative=relative))
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def pass_through(model: ViT, images: Tensor, way: Way, scores: Callable[..., Tensor] | None) -> Tensor:
    """One forward, and in training a backward; the features."""
    with replaced(scores), torch.set_grad_enabled(way == "train"):
        features = model(images).patches
        if way == "train":
            torch.autograd.backward(features.float().square().mean())
            model.zero_grad(set_to_none=True)
    if images.is_cuda:
        torch.cuda.synchronize()
    output: Tensor = features.detach().float()
    return output


def peak_bytes(name: str, size: str, side: int, way: Way) -> int:
    """What one pass takes beside the weights, at most: of the GPU's memory, or of a process of its own."""
    if torch.cuda.is_available():
        return _peak(name, size, side, way)
    command = [sys.executable, "-m", "benchmarks.vitdet", name, size, str(side), way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnequalWork(f"measuring memory failed: {done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def _peak(name: str, size: str, side: int, way: Way) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trunk(size, side, relative=name != "none").to(device, torch.bfloat16)
    small = pixels(side // 4).to(device)
    if name != "flex":  # whose compiled kernel is for one size
        pass_through(model, small, way, SCORES.get(name))  # libraries' own memory
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pass_through(model, pixels(side).to(device), way, SCORES.get(name))
        return int(torch.cuda.max_memory_allocated() - before)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pass_through(model, pixels(side), way, SCORES.get(name))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@contextlib.contextmanager
def replaced(scores: Callable[..., Tensor] | None) -> Iterator[None]:
    """Attention of blocks with relative positions computed another way."""
    if scores is None:
        yield
        return
    original = windows.SpatialAttention.forward

    def forward(self: windows.SpatialAttention, x: Tensor, bias: Tensor | None = None) -> Tensor:
        b, rows, columns, d = x.shape
        q, k, v = self.qkv(x).view(b, rows * columns, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = scores(q, k, v, *relative_parts(self, q, (rows, columns)))
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(b, rows, columns, d))
        return projected

    windows.SpatialAttention.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        windows.SpatialAttention.forward = original  # type: ignore[method-assign]


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

    truth, scored = synthetic()
    shown = {number: Truth((480, 640), objects) for number, objects in truth.items()}

    def ours() -> list[float]:
        figures, _ = coco_figures(shown, scored, COCO_CLASSES, "bbox")
        return [figures[name] for name in (*FIGURES, *RECALLS)]

    return compare(
        "coco-figures",
        f"COCO's box figures of {len(scored)} detections in {COCO_IMAGES} images",
        Contender("pipeline.evaluate.coco", ours),
        Contender("pycocotools", functools.partial(with_pycocotools, truth, scored)),
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
    scored: list[dict[str, Any]] = []
    for number in range(COCO_IMAGES):
        objects = []
        for _ in range(int(draw.integers(0, 15))):
            w, h = draw.uniform(5, 250, 2)
            box = [float(v) for v in (draw.uniform(0, 640 - w), draw.uniform(0, 480 - h), w, h)]
            label, crowd = int(draw.integers(COCO_CLASSES)), int(draw.random() < 0.02)
            annotation = {"image_id": number, "category_id": label, "bbox": box, "area": 0.7 * w * h, "iscrowd": crowd}
            objects.append(annotation)
            for _ in range(int(draw.integers(0, 4))):
                moved = [max(1.0, float(v)) for v in np.add(box, draw.normal(0, 8, 4))]
                score = round(float(draw.random()), 2)
                scored.append({"image_id": number, "category_id": label, "bbox": moved, "score": score})
        for _ in range(20):
            box = [float(v) for v in (*draw.uniform(0, 300, 2), *draw.uniform(5, 180, 2))]
            label, score = int(draw.integers(COCO_CLASSES)), round(float(draw.random() * 0.5), 2)
            scored.append({"image_id": number, "category_id": label, "bbox": box, "score": score})
        truth[number] = objects
    return truth, scored


def with_pycocotools(truth: dict[int, list[dict[str, Any]]], detections: list[dict[str, Any]]) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = [annotation for there in truth.values() for annotation in there]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number, "height": 480, "width": 640} for number in truth],
        "annotations": [{**annotation, "id": i} for i, annotation in enumerate(objects, start=1)],
        "categories": [{"id": number} for number in range(COCO_CLASSES)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


if __name__ == "__main__":
    print(json.dumps(_peak(sys.argv[1], sys.argv[2], int(sys.argv[3]), "train" if sys.argv[4] == "train" else "infer")))
