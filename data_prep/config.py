"""Options of a data set build: what `vitrail prep CONFIG` reads.

Everything that decides the shards' bytes is part of the build's fingerprint; the rest (`RUN_ONLY`) may change before a
build is resumed. The options of sources and filters stand beside them (`data_prep.sources`, `data_prep.filters`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from data_prep.filters.options import FilterOptions
from data_prep.sources.options import SourceOptions
from pipeline.config import Config

SPLIT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class SplitsConfig(Config):
    """How rows without a split column are divided.

    By `content`, all images are read once before anything is written, and equal images go into the same split whatever
    their URLs are; with `dedup.near_splits`, so do similar ones. By `url`, nothing is read, and only equal URLs stay
    together.
    """

    shares: dict[str, float] = {"train": 1.0}  # in this order; they sum to 1
    by: Literal["content", "url"] = "content"

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitsConfig:
        if not self.shares or any(share <= 0 for share in self.shares.values()):
            raise ValueError("shares must name at least one split, each with a positive share")
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares sum to {sum(self.shares.values()):g}, not 1")
        for name in self.shares:
            if not SPLIT_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a split name: use a-z, 0-9, '-' and '_'")
        return self


class DedupConfig(Config):
    """Which images count as the same, over the whole data set, and what becomes of them.

    Images are similar whose perceptual hashes (64 bits, `data_prep.duplicates.signatures`) differ in at most
    `near_distance` bits.
    """

    drop: Literal["none", "exact", "near"] = "none"  # of equal (or similar) images the first input stays
    near_distance: int = Field(default=4, ge=0, le=16)  # bits; used by `near`, by splits and by decontamination
    near_splits: bool = False  # without dropping them, keep similar images in one split
    # Images that are equal or similar to those of these data sets (by manifest) or folders are refused.
    evaluation: tuple[str, ...] = ()

    @property
    def needs_hashes(self) -> bool:
        """Whether perceptual hashes of the images are needed."""
        return self.drop == "near" or self.near_splits or bool(self.evaluation)


class ImageConfig(Config):
    """How images are stored, and which are refused."""

    # keep_ratio: the shorter side becomes `size`; keep_ratio_largest: the longer one; center_crop: a square out of
    # the middle; border: the longer side becomes `size`, white bars make a square of it.
    resize: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = "keep_ratio"
    size: int = Field(default=256, gt=0)  # pixels
    only_if_bigger: bool = True  # smaller images keep their pixels
    format: Literal["keep", "jpg", "webp", "png"] = "jpg"  # keep: JPEG, WebP and PNG stay, others become JPEG
    quality: int = Field(default=95, ge=1, le=100)  # of JPEG and WebP; an image that needs no change keeps its bytes
    min_side: int = Field(default=1, gt=0)  # pixels of the source's shorter side
    max_aspect: float = Field(default=20.0, ge=1)  # longer over shorter side of the source
    max_pixels: int = Field(default=100_000_000, gt=0)  # of the source, read from the header before decoding


class CaptionConfig(Config):
    """Which captions are taken. Lengths are in characters after normalization."""

    min_chars: int = Field(default=1, gt=0)
    max_chars: int = Field(default=4096, gt=0)
    too_long: Literal["cut", "refuse"] = "cut"  # cut: at the last space within the limit


class WebConfig(Config):
    """How and from whom http(s) URLs are read."""

    timeout_s: float = Field(default=20.0, gt=0)  # for an object as a whole: connecting, body, retries and waits
    per_host: int = Field(default=8, gt=0)  # connections of the whole build to one host
    user_agent: str = "vitrail"  # add an address by which hosts can reach you
    # `noai`-like words of the X-Robots-Tag header that mean "don't take this", after img2dataset.
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    max_redirects: int = Field(default=5, ge=0)
    # Only public addresses are connected to, or a stranger's table could have internal hosts read.
    allow_networks: tuple[str, ...] = ()  # private networks that may be read nevertheless, such as 10.1.0.0/16
    ports: tuple[int, ...] = (80, 443)  # of public hosts; in `allow_networks` any port may be used

    @field_validator("allow_networks")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network)
        return value


class FetchConfig(Config):
    """How source images are read."""

    max_bytes: int = Field(default=64 * 2**20, gt=0)
    retries: int = Field(default=3, ge=0)  # after failures that may be temporary
    concurrency: int = Field(default=32, gt=0)  # reads at once per task
    web: WebConfig = WebConfig()


class ShardConfig(Config):
    """How samples are packed. A task holds a whole shard in memory."""

    samples: int = Field(default=5000, gt=0)  # per shard at most: failing rows make it smaller


class RayConfig(Config):
    """Where the work runs."""

    renamed: ClassVar[Mapping[str, str]] = {"workers": "tasks"}

    address: str | None = None  # of a running Ray; None: one that is started on this machine
    tasks: int | None = Field(default=None, ge=0)  # at once; None: one per CPU; 0: in this process, without Ray
    task_retries: int = Field(default=4, ge=0)  # of a task whose process died
    # Processes for each filter with a model; None: as many as there are GPUs for, without GPUs one.
    scorers: int | None = Field(default=None, gt=0)


class PrepConfig(Config):
    """One build: from a source to a data set folder with one subfolder per split."""

    # What may change before a build is resumed.
    RUN_ONLY: ClassVar[frozenset[str]] = frozenset({"name", "output", "fetch", "ray", "max_failed"})

    name: str = "data set"
    output: str  # folder or s3:// prefix
    source: SerializeAsAny[SourceOptions]
    splits: SplitsConfig = SplitsConfig()
    dedup: DedupConfig = DedupConfig()
    image: ImageConfig = ImageConfig()
    caption: CaptionConfig = CaptionConfig()
    # Applied in this order, each to what the earlier ones left.
    filters: tuple[SerializeAsAny[FilterOptions], ...] = ()
    shard: ShardConfig = ShardConfig()
    fetch: FetchConfig = FetchConfig()
    ray: RayConfig = RayConfig()
    seed: int = Field(default=0, ge=0)  # of the shuffle and of the splits
    max_failed: float = Field(default=0.2, ge=0, le=1)  # share of inputs that may fail before the build stops

    @model_validator(mode="after")
    def _fits(self) -> PrepConfig:
        if self.caption.min_chars > self.caption.max_chars:
            raise ValueError("caption.min_chars is larger than caption.max_chars")
        if self.source.names_splits and "splits" in self.model_fields_set:
            raise ValueError("splits and source.split_column exclude each other: remove one")
        return self

    @property
    def needs_scan(self) -> bool:
        """Whether all images must be scanned before anything is written."""
        by_content = not self.source.names_splits and self.splits.by == "content" and len(self.splits.shares) > 1
        return by_content or self.dedup.drop != "none" or bool(self.dedup.evaluation)

    def content_settings(self) -> dict[str, Any]:
        """The settings that decide the shards' bytes, as plain data."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in self.RUN_ONLY}
