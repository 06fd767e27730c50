"""FLIP's training step at mask 0, .5 and .75, beside open_clip with patch_dropout .5; and the loss over several ranks.

ViT-B/16 at 224 pixels with CLIP's text tower, bf16, forward, backward and AdamW, the same batch, weights and masks on
both sides. Captions are those of data/coco_sample where there is one ($VITRAIL_SHARED, or `shared` beside the
repository), else made up of about their length; open_clip encodes all 77 places of the context, ours up to the longest
caption. `flip-open_clip-long` has captions that fill the context.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Comparison, Contender, Goal, UnequalWork, Work, compare
from benchmarks.machine import REPOSITORY

BATCH = 16
LOSS_TOLERANCE = 0.02  # relative: bf16's rounding through two dozen blocks
WORLDS = (1, 2, 4)
LOCAL_BATCH, WIDTH = 1024, 512
MADE_UP = ("a photo of {} giraffes", "a photo of {} oranges, 3 bowls and a broccoli", "{} people on a street")


def run(pairs: int) -> list[Comparison]:
    """`flip-open_clip`, `flip-open_clip-long`, `flip-mask-50`, `flip-mask-75`, `flip-loss-<world>`."""
    captions, source = load_captions()
    long = ["one of the things that are " * 20] * BATCH
    work = Work(BATCH, "pairs")
    results = []
    for name, texts, goal in (("", captions, Goal(ratio_min=1.5)), ("-long", long, Goal())):
        ours = Ours(0.5, texts)
        peer = Peer(ours)
        results.append(
            compare(
                f"flip-open_clip{name}",
                f"a step of ViT-B/16 and CLIP's text tower, batch {BATCH}, bf16, half of the patches masked",
                Contender("vitrail", ours),
                Contender("open_clip, patch_dropout .5", peer),
                check=equal_losses,
                pairs=pairs,
                work=work,
                goal=goal,
                notes={"captions": source if not name else "77 tokens each", "longest_tokens": ours.longest},
            )
        )
    whole = Ours(0.0, captions)
    for ratio, share in ((0.5, 0.50), (0.75, 0.33)):
        results.append(
            compare(
                f"flip-mask-{ratio * 100:.0f}",
                f"a step of ViT-B/16 and CLIP's text tower, batch {BATCH}, bf16, {ratio:.0%} masked against unmasked",
                Contender(f"mask {ratio}", Ours(ratio, captions)),
                Contender("mask 0", whole),
                check=lambda ours, peer: ours > 0 and peer > 0,
                pairs=pairs,
                work=work,
                goal=Goal(),
                notes={"paper_time_share": share, "captions": source},
            )
        )
    return results + [loss_over_ranks(world, pairs) for world in WORLDS]


class Ours:
    """Steps of our stage in plain torch."""

    def __init__(self, ratio: float, captions: list[str]) -> None:
        from pipeline.config import load, validate
        from pipeline.data.batch import Batch
        from pipeline.stages.base import DataFacts
        from pipeline.stages.flip import FlipOptions, FlipStage

        document = load("configs/pretrain/open_clip.yaml")["options"] | {"mask_ratio": ratio}
        torch.manual_seed(0)
        self.stage = FlipStage(validate(FlipOptions, document, where="open_clip.yaml"), DataFacts()).bfloat16()
        images = torch.randint(0, 256, (BATCH, 3, 224, 224), generator=torch.Generator().manual_seed(1))
        text = self.stage.tokenizer(captions[:BATCH])
        self.longest = int((text != 0).sum(1).max())
        ids = torch.arange(BATCH)
        self.batch = Batch(ids, ids, torch.ones(BATCH), 0, images=images.to(torch.uint8), text=text)
        self.optimizer = torch.optim.AdamW(self.stage.parameters(), lr=0.0, fused=True)

    def __call__(self) -> float:
        """The loss; weights stay as they are, so that every pair compares the same work."""
        loss = self.stage.train().loss(self.batch).total / BATCH
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class GivenPatches(nn.Module):
    """In place of open_clip's PatchDropout, which draws its own: as it indexes, but the patches it is told."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        """The class token and the kept ones of x [B,1+N,D]."""
        return torch.cat((x[:, :1], x[:, 1:][torch.arange(len(x))[:, None], self.keep]), dim=1)


class Peer:
    """open_clip's model and loss with the same weights."""

    def __init__(self, ours: Ours) -> None:
        from open_clip.loss import ClipLoss
        from open_clip.model import CLIP

        from pipeline.convert.open_clip import OpenClip
        from pipeline.convert.weights import Known, of_stage
        from pipeline.models.pixels import normalize
        from pipeline.models.trunk.masking import random_masking

        written = OpenClip().write(of_stage(ours.stage), Known())
        described = dict(written.config["model_cfg"])
        described["vision_cfg"] = described["vision_cfg"] | {"patch_dropout": 0.5}
        self.model = CLIP(**described)
        self.model.load_state_dict(written.state)
        self.model = self.model.bfloat16().train()
        config = ours.stage.options.model
        keep = random_masking(ours.batch.seeds, config.num_patches, config.num_kept(0.5)).keep
        self.model.visual.patch_dropout = GivenPatches(keep)
        assert ours.batch.images is not None
        self.images = normalize(ours.batch.images, "clip").bfloat16()
        self.text = ours.batch.text
        self.loss = ClipLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def __call__(self) -> float:
        """The loss; the pixels are ready, ours come as uint8."""
        images, texts, scale = self.model(self.images, self.text)
        loss = self.loss(images, texts, scale)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def equal_losses(ours: float, peer: float) -> bool:
    """Raise `UnequalWork` unless the losses agree."""
    if abs(ours - peer) > LOSS_TOLERANCE * abs(peer):
        raise UnequalWork(f"loss {ours} against {peer}")
    return True


def load_captions() -> tuple[list[str], str]:
    """Captions, and where they are from."""
    shared = Path(os.environ.get("VITRAIL_SHARED", REPOSITORY.parent / "shared"))
    table = shared / "data" / "coco_sample" / "pairs.csv"
    if table.is_file():
        with table.open(encoding="utf-8") as lines:
            return [row["caption"] for row in csv.DictReader(lines)][:BATCH], "data/coco_sample"
    return [MADE_UP[i % len(MADE_UP)].format(i) for i in range(BATCH)], "made up"


def loss_over_ranks(world: int, pairs: int) -> Comparison:
    """Time of CLIP's loss with its gradient over `world` processes of one thread, ours and open_clip's with
    `local_loss` and `gather_with_grad`; what both allocate at most is in the notes, with what more ranks would take.
    """
    times, peaks, values = {}, {}, {}
    for side in ("ours", "peer"):
        answers = _on_ranks(world, side, pairs)
        times[side] = [max(answer[0][i] for answer in answers) for i in range(pairs)]
        peaks[side] = max(answer[1] for answer in answers)
        values[side] = statistics.fmean(answer[2] for answer in answers)
    equal_losses(values["ours"], values["peer"])
    return Comparison(
        name=f"flip-loss-{world}",
        what=f"CLIP's loss and gradient, {world} ranks of {LOCAL_BATCH} pairs of width {WIDTH}, fp32, gloo",
        ours="vitrail, ring",
        peer="open_clip, local_loss and gather_with_grad",
        ours_s=tuple(times["ours"]),
        peer_s=tuple(times["peer"]),
        clock="wall",
        work=Work(world * LOCAL_BATCH, "pairs"),
        goal=Goal(),
        warmup=1,
        notes={
            "peak_bytes": {"ours": peaks["ours"], "peer": peaks["peer"]},
            "on_paper": [on_paper(ranks, 32768 // ranks) for ranks in (1, 8, 64, 256, 1024)],
        },
    )


def on_paper(ranks: int, local: int, width: int = WIDTH) -> dict[str, int]:
    """Bytes of one rank in fp32 for a global batch of ranks x local: what the ring holds (three blocks of embeddings
    with four numbers a pair, gradients, and three matrices of scores of a chunk), what gathering holds (all ranks'
    embeddings and their gradients, and two whole matrices of scores with their gradients), and what a rank sends.
    """
    from pipeline.losses.contrastive import CHUNK

    block = 4 * local * (2 * width + 4)
    columns = min(CHUNK, local)
    total = ranks * local
    return {
        "ranks": ranks,
        "local_batch": local,
        "ring_bytes": 3 * block + 2 * 4 * local * width + 3 * 4 * local * columns,
        "gathering_bytes": 4 * 4 * total * width + 4 * 4 * local * total,
        "ring_sent_bytes": (ranks - 1) * (4 * local * (2 * width + 1) + block),
        "gathering_sent_bytes": 3 * (ranks - 1) * 4 * local * 2 * width,
    }


def _on_ranks(world: int, side: str, pairs: int) -> list[tuple[list[float], int, float]]:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=_rank, args=(answers, r, world, port, side, pairs)) for r in range(world)]
    for process in processes:
        process.start()
    collected = [answers.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    return collected


def _rank(answers: Any, rank: int, world: int, port: int, side: str, pairs: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(rank)
    images, texts = (
        nn.functional.normalize(torch.randn(LOCAL_BATCH, WIDTH, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.full((1,), 10.0, requires_grad=True)
    loss = _loss_of(side, rank, world)
    times, value = [], 0.0
    before = _memory(reset=True)
    for _ in range(pairs + 1):
        torch.distributed.barrier()
        started = time.perf_counter()
        mean_loss = loss(images, texts, scale)
        torch.autograd.backward(mean_loss)
        times.append(time.perf_counter() - started)
        value = float(mean_loss.detach())
    peak = _memory() - before
    answers.put((times[1:], peak, value))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _memory(reset: bool = False) -> int:
    """Most bytes this process has had in memory since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _loss_of(side: str, rank: int, world: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if side == "ours":
        from pipeline.losses.contrastive import clip_loss

        weight = torch.ones(LOCAL_BATCH)
        return lambda images, texts, scale: clip_loss(images, texts, weight, scale).mean()
    from open_clip.loss import ClipLoss

    peer = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world)
    return lambda images, texts, scale: peer(images, texts, scale)
