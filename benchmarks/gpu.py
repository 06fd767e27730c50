"""A training step on one GPU: time, model FLOPs utilisation and memory for ViT-B, L and H, without Ray.

    python -m benchmarks.gpu --sizes B L H --batch 256
    python -m benchmarks.gpu --stage vitdet --sizes B L H --image 1024 --batch 8

MAE's, or ViTDet's with Mask R-CNN on a few drawn rectangles in each image. The step is the engine's that `vitrail
train` runs: forward, backward and AdamW's update in bf16, on images that are in the GPU's memory already. Utilisation
(MFU, Chowdhery et al. 2022) is the products of the forward and backward pass that take place, counted by torch, over
the card's peak: patches that MAE's encoder drops aren't counted. Each size runs in a process of its own, and halves its
batch until it fits.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, alone, command_line
from benchmarks.machine import machine, revision, versions
from pipeline import ranks
from pipeline.config import validate
from pipeline.data.batch import Batch, Instances
from pipeline.models.detection.masks import encode_masks
from pipeline.models.trunk.config import SIZES
from pipeline.stages.base import DataFacts, Stage
from pipeline.stages.mae import MaeOptions, MaeStage
from pipeline.stages.vitdet import VitDetOptions, VitDetStage
from pipeline.train.config import OptimConfig
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.train.flops import flops_per_sample

FORMAT, FORMAT_VERSION = "vitrail.gpu", 1
WARMUP, STEPS = 5, 20
PATCH = {"H": 14}  # MAE's; ViTDet has 16 everywhere
OBJECTS, CLASSES = 8, 80
PEAK_TFLOPS = {
    "GB200": 2450, "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A10G": 70,
    "L4": 121, "RTX 4090": 165, "RTX 3090": 71, "V100": 125,
}  # fmt: skip
"""Dense bf16 (V100: fp16) products with fp32 sums, from the vendor's data sheets; the first name that occurs counts."""


def main(arguments: list[str] | None = None) -> int:
    """Measure the sizes asked for and write `gpu.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--stage", choices=sorted(BUILD), default="mae", help="what is trained (default mae)")
    parser.add_argument("--sizes", nargs="+", default=["B", "L", "H"], help="names in SIZES (default B L H)")
    parser.add_argument("--batch", type=int, default=256, help="images a step to begin with (default 256)")
    parser.add_argument("--image", type=int, default=224, help="pixels of a side (default 224)")
    parser.add_argument("--zero-stage", type=int, default=0, choices=range(4))
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"measured steps (default {STEPS})")
    parser.add_argument("--peak-tflops", type=float, help="of the device, where its name isn't known here")
    parser.add_argument("--checkpointing", action="store_true", help="keep the blocks' inputs only")
    parser.add_argument("--on-cpu", action="store_true", help="try the script without a GPU")
    parser.add_argument("--out", type=Path, help="default gpu.json, or gpu-vitdet.json, under benchmarks/results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.on_cpu:
        print("no GPU here; --on-cpu tries the script without one", file=sys.stderr)
        return 2
    if options.only:
        print(json.dumps(measure(options.only, options.batch, options)))
        return 0
    rows = [row for size in options.sizes if (row := _in_a_process(size, options)) is not None]
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "what": f"one training step of {options.stage} in bf16: forward, backward, update",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "git": revision(),
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
    }
    out = options.out or RESULTS / ("gpu.json" if options.stage == "mae" else f"gpu-{options.stage}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"written: {out}")
    return 0 if len(rows) == len(options.sizes) else 1


def measure(size: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One size in this process.

    Raises:
        torch.OutOfMemoryError: the batch doesn't fit.
    """
    alone()
    device = torch.device("cpu") if options.on_cpu else ranks.device()
    build = BUILD[options.stage]
    images = _images(batch, options.image, objects=options.stage == "vitdet")
    flops = flops_per_sample(build(size, options), images.at(slice(0, 0 + 1)))
    stage = build(size, options)
    num_parameters = sum(p.numel() for p in stage.parameters())
    optim = OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    engine = DeepSpeedEngine(stage, optim, zero_stage=options.zero_stage, precision="bf16", peak_lr=1e-4)
    on_device = images.to(device)
    times, loss = [], 0.0
    for step in range(WARMUP + options.steps):
        if device.type == "cuda":
            torch.cuda.synchronize()
            if step == WARMUP:
                torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = engine.step([dataclasses.replace(on_device, position=step * batch)], 1e-4).loss  # waits for the loss
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= WARMUP:
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    peak = options.peak_tflops or _peak_tflops()
    achieved = flops * batch / seconds / 1e12
    return {
        "stage": options.stage,
        "size": size,
        "image_size": options.image,
        "patch_size": stage.trunk.config.patch_size,
        "batch": batch,
        "mask_ratio": options.mask_ratio if options.stage == "mae" else None,
        "zero_stage": options.zero_stage,
        "activation_checkpointing": options.checkpointing,
        "num_parameters": num_parameters,
        "step_s": {"median": seconds, "min": min(times), "max": max(times), "num": len(times)},
        "images_per_s": batch / seconds,
        "flops_per_image": flops,
        "achieved_tflops": achieved,
        "peak_tflops": peak,
        "mfu": None if peak is None else achieved / peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "reserved_memory_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "loss": loss,
    }


def build_mae(size: str, options: argparse.Namespace) -> Stage:
    """The paper's model of a size."""
    torch.manual_seed(0)
    model = {"size": size, "image_size": options.image, "patch_size": PATCH.get(size, 16)}
    model["activation_checkpointing"] = options.checkpointing
    document = {"model": model, "mask_ratio": options.mask_ratio}
    return MaeStage(validate(MaeOptions, document, where="benchmark"), DataFacts())


def build_vitdet(size: str, options: argparse.Namespace) -> Stage:
    """ViTDet's Mask R-CNN of a size."""
    torch.manual_seed(0)
    depth = SIZES[size].depth
    model = {
        "size": size, "image_size": options.image, "patch_size": 16, "cls_token": False, "final_norm": False,
        "position_trained": True, "position_image_size": 224, "window": 14, "relative_positions": True,
        "global_blocks": [depth // 4 * quarter - 1 for quarter in (1, 2, 3, 4)],
        "activation_checkpointing": options.checkpointing,
    }  # fmt: skip
    return VitDetStage(validate(VitDetOptions, {"model": model}, where="benchmark"), DataFacts(("",) * CLASSES))


BUILD = {"mae": build_mae, "vitdet": build_vitdet}


def table(rows: list[dict[str, Any]]) -> str:
    """One line a size."""
    lines = [f"{'size':6}{'batch':>7}{'step':>11}{'images/s':>11}{'TFLOP/s':>10}{'MFU':>8}{'memory':>11}"]
    for row in rows:
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f} GiB"
        step = f"{1000 * row['step_s']['median']:.0f} ms"
        speed = f"{row['images_per_s']:>11.1f}{row['achieved_tflops']:>10.1f}"
        lines.append(f"{row['size']:6}{row['batch']:>7}{step:>11}{speed}{mfu:>8}{memory:>11}")
    return "\n".join(lines)


def _in_a_process(size: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure in a fresh process, with ever smaller batches while memory doesn't suffice."""
    batch = options.batch
    while batch >= 1:
        same = [f"--image={options.image}", f"--zero-stage={options.zero_stage}", f"--mask-ratio={options.mask_ratio}"]
        same += [f"--stage={options.stage}", f"--steps={options.steps}", *(["--on-cpu"] if options.on_cpu else [])]
        same += ["--checkpointing"] if options.checkpointing else []
        same += [f"--peak-tflops={options.peak_tflops}"] if options.peak_tflops else []
        command = [sys.executable, "-m", "benchmarks.gpu", f"--only={size}", f"--batch={batch}", *same]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return row
        if "OutOfMemoryError" not in done.stderr:
            print(f"{size}: {done.stderr}", file=sys.stderr)
            return None
        print(f"{size}: a batch of {batch} doesn't fit, trying {batch // 2}", file=sys.stderr)
        batch //= 2
    return None


def _images(batch: int, side: int, *, objects: bool) -> Batch:
    images = torch.randint(
        0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    whole = Batch(torch.arange(batch), torch.arange(batch), torch.ones(batch), 0, images=images)
    if not objects:
        return whole
    return dataclasses.replace(whole, instances=tuple(rectangles(i, side) for i in range(batch)))


def rectangles(seed: int, side: int, num: int = OBJECTS) -> Instances:
    """Objects of 1/16 to 1/2 of an image's side, with their masks."""
    draw = torch.Generator().manual_seed(seed)
    sides = side * (torch.rand(num, 2, generator=draw) * 7 / 16 + 1 / 16)
    corner = torch.rand(num, 2, generator=draw) * (side - sides)
    boxes = torch.cat([corner, corner + sides], dim=1).round()
    place = torch.arange(side)
    across = (place >= boxes[:, :1]) & (place < boxes[:, 2:3])
    down = (place >= boxes[:, 1:2]) & (place < boxes[:, 3:4])
    masks = tuple(encode_masks(down.unsqueeze(2) & across.unsqueeze(1)))
    return Instances(boxes, torch.randint(CLASSES, (num,), generator=draw), masks, torch.zeros(num, dtype=torch.int64))


def _peak_tflops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((float(peak) for card, peak in PEAK_TFLOPS.items() if card in name), None)


if __name__ == "__main__":
    sys.exit(main())
