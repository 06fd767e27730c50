"""Decoding photos to RGB pixels at full size: ours against Pillow and against torchvision, one thread each.

The photos are the JPEGs of data/coco_sample in the optional data folder ($VITRAIL_SHARED, or `shared` beside the
repository). Where there is none, JPEGs of about that size are made here from smooth random fields, which the result's
notes say: such images hold less detail, so they decode faster than photos do.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import Comparison, Contender, UnequalWork, Work, compare
from benchmarks.machine import REPOSITORY

NUM_GENERATED = 64
MAX_MEAN_DIFFERENCE = 2.0  # grey levels: decoders differ in how they enlarge the colour planes
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def run(pairs: int) -> list[Comparison]:
    """`decode-pillow` and `decode-torchvision`: CPU time for all photos once."""
    from pipeline.data.images.decode import decode

    photos, source = load_photos()
    megapixels = (
        sum(Image.open(io.BytesIO(photo)).width * Image.open(io.BytesIO(photo)).height for photo in photos) / 1e6
    )
    peers = {"pillow": with_pillow, "torchvision": torchvision_decoder()}
    return [
        compare(
            f"decode-{name}",
            f"{len(photos)} JPEG photos to RGB pixels at full size, one thread",
            Contender("pipeline.data.images.decode.decode", functools.partial(each, decode, photos)),
            Contender(name, functools.partial(each, peer, photos)),
            check=same_pixels,
            pairs=pairs,
            clock="cpu",
            work=Work(len(photos), "images"),
            notes={"photos": source, "megapixels": round(megapixels, 2)},
        )
        for name, peer in peers.items()
    ]


def load_photos() -> tuple[list[bytes], str]:
    """Encoded photos, and where they are from."""
    shared = Path(os.environ.get("VITRAIL_SHARED", REPOSITORY.parent / "shared"))
    files = sorted((shared / "data" / "coco_sample" / "images").glob("*.jpg"))
    if files:
        return [file.read_bytes() for file in files], "data/coco_sample"
    return [generated(seed) for seed in range(NUM_GENERATED)], "generated smooth fields"


def generated(seed: int) -> bytes:
    """A 640 by 480 JPEG of a smooth random field."""
    coarse = np.random.default_rng(seed).integers(0, 256, size=(24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def each(decode: Callable[[bytes], Pixels], photos: Sequence[bytes]) -> list[Pixels]:
    """All photos, decoded."""
    return [decode(photo) for photo in photos]


def with_pillow(photo: bytes) -> Pixels:
    """Pillow's plain way."""
    return np.asarray(Image.open(io.BytesIO(photo)).convert("RGB"))


def torchvision_decoder() -> Callable[[bytes], Pixels]:
    """The decoder of torchvision, its result as rows of pixels too."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    torch.set_num_threads(1)

    def decode(photo: bytes) -> Pixels:
        encoded = torch.frombuffer(bytearray(photo), dtype=torch.uint8)
        pixels: Pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).contiguous().numpy()
        return pixels

    return decode


def same_pixels(ours: Sequence[Pixels], peer: Sequence[Pixels]) -> bool:
    """Equal sizes, and pixels equal but for the decoders' rounding.

    Raises:
        UnequalWork: they aren't, with the first photo that differs.
    """
    if len(ours) != len(peer):
        raise UnequalWork(f"{len(ours)} photos decoded against {len(peer)}")
    for number, (our_photo, other) in enumerate(zip(ours, peer, strict=True)):
        if our_photo.shape != other.shape:
            raise UnequalWork(f"photo {number}: {our_photo.shape} against {other.shape}")
        difference = float(np.abs(our_photo.astype(np.int16) - other).mean())
        if difference > MAX_MEAN_DIFFERENCE:
            raise UnequalWork(f"photo {number} differs by {difference:.1f} grey levels on average")
    return True
