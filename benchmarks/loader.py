"""The training loader: against open_clip's pipeline and ImageFolder, S3 against disk, and resuming in mid-epoch.

All four run on real photos (see `benchmarks.decode`) packed by our own shard writer:

- `loader-open_clip`: CPU seconds of one process from tars to normalised batches of RandomResizedCrop 224, scale
  (.2, 1), bicubic, flip, and tokenised captions; open_clip's own `get_wds_dataset` and CLIP tokenizer on the same tars.
- `loader-imagefolder`: the same without captions, against torchvision's ImageFolder and torch's DataLoader.
- `loader-s3`: wall time of our loader reading from an S3 server on this machine, against our loader reading from disk.
- `loader-resume`: time from nothing to the first batch at sample 10 million, against at the start of the epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.decode import load_photos
from benchmarks.harness import Comparison, Contender, Goal, UnequalWork, Work, compare
from data_prep.shards.commit import Sample, ShardWriter, sample_key, shard_stem
from launch.s3_server import S3Server, find_rclone
from pipeline import storage
from pipeline.data.images.pixels import CLIP_MEAN, CLIP_STD, normalise
from pipeline.data.images.transforms import ImageExample, Tokenize, TrainImage
from pipeline.data.loader import Cursor, Loader, Step
from pipeline.data.manifest import MANIFEST_NAME, Manifest, Shard, index_bytes, manifest_bytes, read_manifest
from tests.support.loaders import loader_of

SIZE, BATCH, NUM_BATCHES = 224, 32, 12
SCALE = (0.2, 1.0)
RESUME_AT = 10_000_000
S3_STEPS = 24


def run(pairs: int) -> list[Comparison]:
    """See the module's docstring."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="vitrail-bench-") as folder:
        photos, source = load_photos()
        manifest = pack(photos, f"{folder}/tars", num_samples=NUM_BATCHES * BATCH, per_shard=96)
        notes = {"photos": source, "batch": BATCH, "crop": SIZE, "scale": SCALE, "interpolation": "bicubic"}
        results = [
            against_open_clip(manifest, pairs, notes),
            against_image_folder(manifest, photos, Path(folder), pairs, notes),
        ]
        if find_rclone() is not None:
            results.append(from_s3(manifest, Path(folder), pairs, notes))
        results.append(resuming(Path(folder), pairs))
    return results


def pack(photos: Sequence[bytes], url: str, *, num_samples: int, per_shard: int) -> Manifest:
    """A data set of photos, each as often as it takes, with captions."""
    shards: list[Shard] = []
    for first in range(0, num_samples, per_shard):
        writer = ShardWriter()
        for i in range(first, min(first + per_shard, num_samples)):
            caption = f"a photo, number {i}, of whatever was before the camera".encode()
            writer.add(Sample(sample_key(i), {"jpg": photos[i % len(photos)], "txt": caption}))
        stem = shard_stem(len(shards))
        tar, offsets = writer.finish()
        shards.append(_write(url, stem, tar, index_bytes(offsets), writer.num_samples))
    return _finish(url, shards)


def _write(url: str, stem: str, tar: bytes, index: bytes, num_samples: int) -> Shard:
    storage.write(storage.join(url, f"{stem}.tar"), tar)
    storage.write(storage.join(url, f"{stem}.index.npy"), index)
    hashes = [hashlib.sha256(data).hexdigest() for data in (tar, index)]
    return Shard(f"{stem}.tar", num_samples, len(tar), hashes[0], f"{stem}.index.npy", hashes[1])


def _finish(url: str, shards: Sequence[Shard]) -> Manifest:
    manifest = Manifest(url, tuple(shards), sum(shard.num_samples for shard in shards), "benchmark")
    storage.write(storage.join(url, MANIFEST_NAME), manifest_bytes(manifest))
    return read_manifest(url)


def ours(manifest: Manifest, tokenizer: Tokenize | None, **settings: Any) -> Loader:
    """Our loader as all comparisons use it."""
    transform = ImageExample(TrainImage((SIZE, SIZE), SCALE), text=tokenizer)
    options = {"seed": 0, "global_batch": BATCH, "rank": 0, "world_size": 1, "lanes": 8, "block": 64, "window": 128}
    return loader_of(manifest, transform, **(options | settings))


def our_batches(steps: Iterator[Step]) -> list[tuple[Tensor, ...]]:
    """The next batches, as a model takes them.

    The loader goes on from call to call, and a call ends when what is made ahead is made: so each call is charged with
    as many batches as it takes, and none of the work falls into the other side's time.
    """
    made: list[tuple[Tensor, ...]] = []
    for step in itertools.islice(steps, NUM_BATCHES):
        (batch,) = step.micro
        assert batch.images is not None
        images = normalise(batch.images, CLIP_MEAN, CLIP_STD)
        made.append((images,) if batch.text is None else (images, batch.text))
    used_s = -1.0
    while time.process_time() - used_s > 0.002:
        used_s = time.process_time()
        time.sleep(0.1)
    return made


def against_open_clip(manifest: Manifest, pairs: int, notes: dict[str, Any]) -> Comparison:
    """CPU time against open_clip's pipeline, in one process each."""
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
    from open_clip_train import data as open_clips  # type: ignore[import-untyped]

    # webdataset 1.0 marks the ends of archives, which open_clip's reader, written for an older one, doesn't know.
    open_clips.tar_file_expander = functools.partial(open_clips.tar_file_expander, eof_value=None)
    tokenizer = SimpleTokenizer()
    config = PreprocessCfg(size=SIZE, mean=CLIP_MEAN, std=CLIP_STD)
    preprocess = image_transform_v2(config, is_train=True, aug_cfg=AugmentationCfg(scale=SCALE))
    preprocess.transforms.insert(1, _flip())
    shards = f"{manifest.url}/{{00000..{len(manifest.shards) - 1:05d}}}.tar"
    args = argparse.Namespace(
        train_data=shards,
        train_num_samples=NUM_BATCHES * BATCH,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        world_size=1,
        workers=0,
    )

    def theirs() -> list[tuple[Tensor, ...]]:
        loader = open_clips.get_wds_dataset(args, preprocess, True, tokenizer=tokenizer).dataloader
        return [tuple(batch) for batch in itertools.islice(loader, NUM_BATCHES)]

    with ours(manifest, tokenizer) as loader:
        return compare(
            "loader-open_clip",
            f"{NUM_BATCHES} batches of {BATCH}: RandomResizedCrop {SIZE}, flip, tokens, normalised; one process",
            Contender("pipeline.data.loader", functools.partial(our_batches, loader.steps(Cursor()))),
            Contender("open_clip_train.data.get_wds_dataset", theirs),
            check=alike,
            pairs=pairs,
            clock="cpu",
            work=Work(NUM_BATCHES * BATCH, "images"),
            goal=Goal(ratio_min=2.0),
            notes=notes | {"augmentation": "open_clip's train transform with a flip added, so that both flip"},
        )


def _flip() -> Any:
    from torchvision.transforms import RandomHorizontalFlip

    return RandomHorizontalFlip()


def against_image_folder(
    manifest: Manifest, photos: Sequence[bytes], folder: Path, pairs: int, notes: dict[str, Any]
) -> Comparison:
    """CPU time against ImageFolder with torchvision's transforms on Pillow's images."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    files = folder / "files" / "photos"
    files.mkdir(parents=True)
    for i in range(manifest.num_samples):
        (files / f"{i:06d}.jpg").write_bytes(photos[i % len(photos)])
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    data = ImageFolder(str(files.parent), transform)

    def theirs() -> list[tuple[Tensor, ...]]:
        loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True)
        return [(images,) for images, _ in itertools.islice(loader, NUM_BATCHES)]

    with ours(manifest, None) as loader:
        return compare(
            "loader-imagefolder",
            f"{NUM_BATCHES} batches of {BATCH}: RandomResizedCrop {SIZE}, flip, normalised; one process",
            Contender("pipeline.data.loader, from tars", functools.partial(our_batches, loader.steps(Cursor()))),
            Contender("torchvision ImageFolder and DataLoader, from files", theirs),
            check=alike,
            pairs=pairs,
            clock="cpu",
            work=Work(NUM_BATCHES * BATCH, "images"),
            goal=Goal(ratio_min=2.0),
            notes=notes,
        )


def alike(ours: Sequence[tuple[Tensor, ...]], peer: Sequence[tuple[Tensor, ...]]) -> bool:
    """As many batches of equal shapes and types, and images of about the same brightness and contrast.

    Raises:
        UnequalWork: they aren't.
    """
    shapes = [[(tuple(t.shape), t.dtype) for batch in side for t in batch] for side in (ours, peer)]
    if shapes[0] != shapes[1]:
        raise UnequalWork(f"batches {shapes[0][:2]} against {shapes[1][:2]}")
    for figure in (torch.mean, torch.std):
        values = [float(figure(torch.cat([batch[0] for batch in side]))) for side in (ours, peer)]
        if abs(values[0] - values[1]) > 0.1:
            raise UnequalWork(f"{figure.__name__} of the pixels is {values[0]:.3f} against {values[1]:.3f}")
    return True


def from_s3(manifest: Manifest, folder: Path, pairs: int, notes: dict[str, Any]) -> Comparison:
    """Wall time of steps from a server of this machine against steps from its disk, one worker each."""
    before = dict(os.environ)
    (folder / "s3" / "bench-marks").mkdir(parents=True)
    with S3Server(folder / "s3") as server:
        os.environ.update(server.environment)
        try:
            for file in sorted(Path(manifest.url).iterdir()):
                storage.write(f"s3://bench-marks/tars/{file.name}", file.read_bytes())
            remote = read_manifest("s3://bench-marks/tars")
            with ours(remote, None, workers=1) as there, ours(manifest, None, workers=1) as on_disk:
                sides = [_Watched(loader) for loader in (there, on_disk)]
                outcome = compare(
                    "loader-s3",
                    f"{S3_STEPS} steps of {BATCH} images from S3 on loopback against local disk, one worker",
                    Contender("from S3", sides[0]),
                    Contender("from disk", sides[1]),
                    check=lambda ours, peer: ours == peer,
                    pairs=pairs,
                    work=Work(S3_STEPS * BATCH, "images"),
                    goal=Goal(ratio_min=0.9),
                    notes=notes
                    | {
                        "ratio": "the rate from S3 over the rate from disk",
                        "server": "rclone serve s3, on the same cores, its work counted",
                    },
                )
                spent = {name: side.ms_an_image() for name, side in zip(("S3", "disk"), sides, strict=True)}
                return dataclasses.replace(outcome, notes=outcome.notes | {"cpu_ms_an_image_of_our_worker": spent})
        finally:
            for name in set(os.environ) - set(before):
                del os.environ[name]
            os.environ.update(before)


class _Watched:
    """Steps of a loader with one worker, and the worker's CPU time."""

    def __init__(self, loader: Loader) -> None:
        others = psutil.Process().children()
        self._steps = loader.steps(Cursor())
        (self._worker,) = [child for child in psutil.Process().children() if child not in others]
        self._spent: list[float] = []

    def __call__(self) -> str:
        """The next steps; a digest of what they hold."""
        before, digest = self._cpu_s(), hashlib.sha256()
        for step in itertools.islice(self._steps, S3_STEPS):
            for batch in step.micro:
                assert batch.images is not None
                digest.update(batch.ids.numpy().tobytes())
                digest.update(batch.images.numpy().tobytes())
        self._spent.append(self._cpu_s() - before)
        return digest.hexdigest()

    def ms_an_image(self) -> float:
        """Of the worker's CPU; the median over the calls after the first, which began with its start."""
        return round(statistics.median(self._spent[1:]) / (S3_STEPS * BATCH) * 1000, 3)

    def _cpu_s(self) -> float:
        times = self._worker.cpu_times()
        return float(times.user + times.system)


def resuming(folder: Path, pairs: int) -> Comparison:
    """First batch at sample 10 million: manifest, order, reads and decoding, in this process."""
    url, per_shard, num_shards = f"{folder}/simulated", 10_000, 2_000
    writer = ShardWriter()
    photos, _ = load_photos()
    small = [_thumbnail(photo) for photo in photos]
    for i in range(per_shard):
        writer.add(Sample(sample_key(i), {"jpg": small[i % len(small)]}))
    tar, offsets = writer.finish()
    first = _write(url, shard_stem(0), tar, index_bytes(offsets), per_shard)
    shards = [first]
    for number in range(1, num_shards):
        names = (f"{shard_stem(number)}.tar", f"{shard_stem(number)}.index.npy")
        for name, known in zip(names, (first.name, first.index_name), strict=True):
            os.link(Path(url) / known, Path(url) / name)  # the same bytes under another name
        shards.append(first._replace(name=names[0], index_name=names[1]))
    _finish(url, shards)

    def first_batch(start: int) -> tuple[int, ...]:
        transform = ImageExample(TrainImage((SIZE, SIZE), SCALE))
        options = {"seed": 0, "global_batch": 256, "rank": 0, "world_size": 1}
        with loader_of(read_manifest(url), transform, **options) as loader:
            (batch,) = next(loader.steps(Cursor(0, start))).micro
        assert batch.images is not None
        return tuple(batch.images.shape)

    return compare(
        "loader-resume",
        f"from nothing to the first batch of 256 at sample {RESUME_AT:,} of {per_shard * num_shards:,}",
        Contender("at sample 10 million", functools.partial(first_batch, RESUME_AT)),
        Contender("at the start of the epoch", functools.partial(first_batch, 0)),
        check=lambda ours, peer: ours == peer == (256, 3, SIZE, SIZE),
        pairs=pairs,
        goal=Goal(ours_max_s=2.0),
        notes={"data": f"{num_shards} shards of {per_shard} small photos, one tar under as many names"},
    )


def _thumbnail(photo: bytes) -> bytes:
    import io

    from PIL import Image

    image, buffer = Image.open(io.BytesIO(photo)).convert("RGB"), io.BytesIO()
    image.thumbnail((96, 96))
    image.save(buffer, "JPEG")
    return buffer.getvalue()
