"""Shards from photos over loopback HTTP: vitrail against img2dataset, in images per CPU-second of one process.

img2dataset runs in an environment of its own, which is made below build/ on the first run. Both fetch the same photos
from the same server, whose CPU time isn't counted, and write shards with equal settings: shortest side 256, JPEG 95,
only if bigger (`prep-small`, `prep-12mp`), or untouched (`prep-pass`). Start-up doesn't matter at scale, so each side
builds a small and a large set, and the difference counts. Quality is compared as PSNR against Lanczos resizing of full
decodes. `prep-bare` compares with a loop that only decodes, resizes and encodes the same photos by the same libraries,
which shows what fetching, hashing, packing and accounting cost.
"""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import simplejpeg
import yaml
from PIL import Image

from benchmarks.decode import load_photos
from benchmarks.harness import Comparison, Contender, Goal, UnequalWork, Work, compare
from benchmarks.machine import REPOSITORY

PEER = "img2dataset==1.47.0"
ENVIRONMENT = REPOSITORY / "build" / "img2dataset"
SIZE, QUALITY = 256, 95
_LARGE = (4000, 3000)  # pixels of the 12-megapixel photos, which are enlarged ones


class Case(NamedTuple):
    """One comparison: which photos, and how many in the small and the large set."""

    name: str
    large: bool
    counts: tuple[int, int]
    resize: bool


CASES = (
    Case("prep-small", False, (100, 1100), True),
    Case("prep-12mp", True, (10, 90), True),
    Case("prep-pass", False, (100, 1100), False),
)


def run(pairs: int) -> list[Comparison]:
    """The comparisons of `CASES`."""
    python = _environment()
    photos, source = load_photos()
    comparisons = []
    with tempfile.TemporaryDirectory(prefix="vitrail-bench-") as folder:
        for case in CASES:
            work = Path(folder) / case.name
            _write_photos(work / "photos", photos, large=case.large)
            server = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.photo_server", str(work / "photos")],
                stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
            )  # fmt: skip
            try:
                assert server.stdout is not None
                address = server.stdout.readline().strip()
                comparisons.append(_compare(case, work, address, python, source, pairs))
                if case.resize and not case.large:
                    comparisons.append(_compare_bare(case, work, address, source, pairs))
            finally:
                server.kill()
                server.wait()
    return comparisons


def _compare(case: Case, work: Path, address: str, python: Path, source: str, pairs: int) -> Comparison:
    meter = _Meter()
    quality: dict[str, list[float]] = {"ours": [], "peer": []}
    sides: dict[str, Callable[[Path, Path], None]] = {
        "ours": functools.partial(_ours, case),
        "peer": functools.partial(_peer, case, python),
    }
    tables = [_table(work, address, count) for count in case.counts]
    contenders = {name: functools.partial(_both, side, tables, work / name, meter) for name, side in sides.items()}
    difference = case.counts[1] - case.counts[0]
    photos = work / "photos"

    def check(ours: dict[str, bytes], peer: dict[str, bytes]) -> bool:
        if len(ours) != case.counts[1] or len(peer) != case.counts[1]:
            raise UnequalWork(f"{len(ours)} images of ours, {len(peer)} of the peer's, {case.counts[1]} wanted")
        for name, images in (("ours", ours), ("peer", peer)):
            quality[name].append(_quality(images, photos, resize=case.resize))
        if quality["ours"][-1] < quality["peer"][-1] - 0.05:
            raise UnequalWork(f"PSNR of {quality['ours'][-1]:.2f} dB against {quality['peer'][-1]:.2f} dB")
        return True

    done = compare(
        case.name,
        f"{difference} photos ({source}{', enlarged to 12 megapixels' if case.large else ''}) from loopback HTTP to "
        + ("shards, shortest side 256, JPEG 95" if case.resize else "shards, untouched"),
        Contender("vitrail", contenders["ours"]),
        Contender("img2dataset", contenders["peer"]),
        check=check,
        pairs=pairs,
        warmup=0,
        clock="cpu",
        work=Work(difference, "images"),
        goal=Goal(ratio_min=2.0),
        timer=meter.total,
    )
    done.notes.update({"psnr_db": {name: round(statistics.median(q), 2) for name, q in quality.items()}, "peer": PEER})
    return done


def _compare_bare(case: Case, work: Path, address: str, source: str, pairs: int) -> Comparison:
    """Compare with the bare loop."""
    meter = _Meter()
    tables = [_table(work, address, count) for count in case.counts]
    difference = case.counts[1] - case.counts[0]

    def loop() -> int:
        spent = [_cpu_s(functools.partial(_call_bare, work / "photos", count)) for count in case.counts]
        meter.add(spent[1] - spent[0])
        return case.counts[1]

    return compare(
        "prep-bare",
        f"{difference} photos ({source}) from loopback HTTP to shards, against a bare loop of decode, resize, encode",
        Contender("vitrail", functools.partial(_both, functools.partial(_ours, case), tables, work / "ours", meter)),
        Contender("bare loop", loop),
        check=lambda ours, count: len(ours) == count,
        pairs=pairs,
        warmup=0,
        clock="cpu",
        work=Work(difference, "images"),
        goal=Goal(ratio_min=0.85),
        timer=meter.total,
    )


def _call_bare(photos: Path, count: int) -> None:
    _call([sys.executable, "-m", "benchmarks.prep", str(photos), str(count)], REPOSITORY)


def bare_loop(photos: Path, count: int) -> None:
    """Decode, resize and encode `count` photos, whose files are read only once."""
    import torch

    encoded = [path.read_bytes() for path in sorted(photos.iterdir())]
    memory = np.empty(64 * 2**20, np.uint8)
    for number in range(count):
        pixels = simplejpeg.decode_jpeg(encoded[number % len(encoded)], "RGB", buffer=memory)
        height, width = pixels.shape[:2]
        side = min(height, width)
        if side > SIZE:
            size = (round(height * SIZE / side), round(width * SIZE / side))
            image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
            scaled = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True)[0]
            pixels = scaled.permute(1, 2, 0).contiguous().numpy()
        simplejpeg.encode_jpeg(pixels, QUALITY, colorsubsampling="420", fastdct=False)


class _Meter:
    """The sum of the CPU seconds that count."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def total(self) -> float:
        return self._seconds

    def add(self, seconds: float) -> None:
        self._seconds += seconds


def _both(side: Callable[[Path, Path], None], tables: list[Path], folder: Path, meter: _Meter) -> dict[str, bytes]:
    """Build the small and the large set; returns the large one's images by URL."""
    spent = []
    for table in tables:
        shutil.rmtree(folder, ignore_errors=True)
        spent.append(_cpu_s(functools.partial(side, table, folder)))
    meter.add(spent[1] - spent[0])
    return dict(_samples(folder))


def _cpu_s(run: Callable[[], None]) -> float:
    """CPU seconds of the processes that `run` starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _ours(case: Case, table: Path, folder: Path) -> None:
    image: dict[str, Any] = {"resize": "keep_ratio", "size": SIZE, "format": "jpg", "quality": QUALITY}
    document = {
        "output": str(folder),
        "source": {"type": "table", "url": str(table)},
        "image": image if case.resize else {"resize": "no", "format": "keep"},
        "fetch": {"web": {"allow_networks": ["127.0.0.0/8"], "per_host": 32}},
        "ray": {"tasks": 0},
        "shard": {"samples": 500},
    }
    config = table.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(document))
    _call([sys.executable, "-m", "launch", "prep", str(config)], REPOSITORY)


def _peer(case: Case, python: Path, table: Path, folder: Path) -> None:
    resize = [f"--image_size={SIZE}", "--resize_mode=keep_ratio", "--resize_only_if_bigger=True"]
    _call(
        [
            str(python.parent / "img2dataset"),
            f"--url_list={table}",
            "--input_format=parquet",
            "--url_col=url",
            "--caption_col=caption",
            f"--output_folder={folder}",
            "--output_format=webdataset",
            "--processes_count=1",
            "--thread_count=32",
            "--number_sample_per_shard=500",
            "--compute_hash=sha256",
            "--encode_quality=95",
            "--enable_wandb=False",
            *(resize if case.resize else ["--resize_mode=no", "--skip_reencode=True"]),
        ],
        folder.parent,
    )


def _call(command: list[str], cwd: Path) -> None:
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    if done.returncode:
        raise UnequalWork(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")


def _environment() -> Path:
    """The Python of the peer's environment, which is made on the first call."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "bin" / "img2dataset").exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", PEER], check=True)
    return python


def _write_photos(folder: Path, photos: list[bytes], *, large: bool) -> None:
    folder.mkdir(parents=True)
    for number, photo in enumerate(photos[:10] if large else photos):
        if large:
            buffer = io.BytesIO()
            enlarged = Image.open(io.BytesIO(photo)).convert("RGB").resize(_LARGE, Image.Resampling.BICUBIC)
            enlarged.save(buffer, "JPEG", quality=90)
            photo = buffer.getvalue()
        (folder / f"{number}.jpg").write_bytes(photo)


def _table(work: Path, address: str, count: int) -> Path:
    kinds = len(list((work / "photos").iterdir()))
    urls = [f"{address}/{i % kinds}.jpg?{i}" for i in range(count)]
    table = work / f"{count}.parquet"
    pa.parquet.write_table(pa.table({"url": urls, "caption": [f"photo {i}" for i in range(count)]}), table)
    return table


def _samples(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(URL, stored image) of every sample in a folder of shards."""
    for path in sorted(folder.rglob("*.tar")):
        members: dict[str, bytes] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                members[member.name] = file.read() if file else b""
        for name, data in members.items():
            if name.endswith(".json"):
                image = next(members[name[:-5] + e] for e in (".jpg", ".webp", ".png") if name[:-5] + e in members)
                yield json.loads(data)["url"], image


def _quality(images: dict[str, bytes], photos: Path, *, resize: bool) -> float:
    """Mean PSNR in dB of a few stored images against Lanczos resizing of full decodes; 99 for equal bytes."""
    values = []
    for url, data in sorted(images.items())[:: max(1, len(images) // 20)]:
        source = (photos / url.rpartition("/")[2].partition("?")[0]).read_bytes()
        if not resize:
            values.append(99.0 if source == data else 0.0)
            continue
        stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)
        full = Image.open(io.BytesIO(source)).convert("RGB")
        size = (stored.shape[1], stored.shape[0])
        bands = [np.asarray(b.convert("F").resize(size, Image.Resampling.LANCZOS)) for b in full.split()]
        error = np.mean((stored - np.stack(bands, -1)) ** 2)
        values.append(10 * np.log10(255**2 / error))
    return float(np.mean(values))


if __name__ == "__main__":
    bare_loop(Path(sys.argv[1]), int(sys.argv[2]))
