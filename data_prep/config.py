"""Options of a data set build: what `vitrail prep CONFIG` reads.

Everything that decides the shards' bytes is part of the build's fingerprint; the rest (`RUN_ONLY`) may change between
a build and its rerun.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config import Config

SPLIT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class TableConfig(Config):
    """Pairs listed in a table: one row per image, the columns chosen by name.

    An image's URL may be relative to the table's folder, an absolute path, or `s3://`. Tables are often somebody
    else's, so a row may name only places below the table's folder, in the table's bucket, or below one of `allow`;
    others are counted as failures (`place_not_allowed`).
    """

    type: Literal["table"] = "table"
    url: str  # a file, or a folder of files of one format, taken in the order of their names
    format: Literal["auto", "parquet", "csv", "tsv", "jsonl"] = "auto"  # auto: by the name's ending; .gz may follow
    url_column: str = "url"
    caption_column: str | None = "caption"  # None: images without captions, no `txt` members
    label_column: str | None = None  # an integer, or a name out of `classes`
    split_column: str | None = None  # the row's split by name; None: `splits`
    annotations_column: str | None = None  # JSON: a list of COCO annotations in pixels of the upright image
    classes: tuple[str, ...] | str = ()  # names of the labels 0, 1, ..., or where a JSON list of them lies
    allow: tuple[str, ...] = ()  # further folders and s3:// prefixes that rows may name


class SplitsConfig(Config):
    """How rows without a split column are divided.

    By `content`, all images are read once before anything is written, and equal images land in the same split
    whatever their URLs are. By `url`, nothing is read, and only equal URLs stay together.
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
                raise ValueError(f"{name!r} is no split name: use a-z, 0-9, '-' and '_'")
        return self


class ImageConfig(Config):
    """What is done to the images, and which are refused."""

    resize: Literal["no", "keep_ratio", "center_crop"] = "keep_ratio"
    size: int = Field(default=256, gt=0)  # pixels: of the shorter side (keep_ratio), of both sides (center_crop)
    only_if_bigger: bool = True  # images that are smaller already keep their pixels
    format: Literal["keep", "jpg", "webp", "png"] = "jpg"  # keep: JPEG, WebP and PNG stay what they are, others: JPEG
    quality: int = Field(default=95, ge=1, le=100)  # of JPEG and WebP; where nothing changes, bytes pass untouched
    min_side: int = Field(default=1, gt=0)  # pixels of the source's shorter side
    max_aspect: float = Field(default=20.0, ge=1)  # longer over shorter side of the source
    max_pixels: int = Field(default=100_000_000, gt=0)  # of the source, read from the header before decoding


class CaptionConfig(Config):
    """Which captions are taken. Lengths are in characters after normalisation."""

    min_chars: int = Field(default=1, gt=0)
    max_chars: int = Field(default=4096, gt=0)
    too_long: Literal["cut", "refuse"] = "cut"  # cut: at the last space within the limit


class FetchConfig(Config):
    """How source images are read."""

    max_bytes: int = Field(default=64 * 2**20, gt=0)
    retries: int = Field(default=3, ge=0)  # after answers that may pass
    concurrency: int = Field(default=8, gt=0)  # reads under way per task


class ShardConfig(Config):
    """How samples are packed. A task holds one whole shard in memory."""

    samples: int = Field(default=5000, gt=0)  # at most; rows that fail make a shard smaller


class RayConfig(Config):
    """Where the work runs."""

    address: str | None = None  # of a running Ray; None: one of this machine's own
    workers: int | None = Field(default=None, ge=0)  # tasks at once; None: one per CPU; 0: this process, without Ray
    task_retries: int = Field(default=4, ge=0)  # of a task whose worker died


class PrepConfig(Config):
    """One build: from a source to a data set folder with one subfolder per split."""

    # What may differ between a build and the rerun that finishes it.
    RUN_ONLY: ClassVar[frozenset[str]] = frozenset({"name", "output", "fetch", "ray", "max_failed"})

    name: str = "data set"
    output: str  # folder or s3:// prefix
    source: TableConfig
    splits: SplitsConfig = SplitsConfig()
    image: ImageConfig = ImageConfig()
    caption: CaptionConfig = CaptionConfig()
    shard: ShardConfig = ShardConfig()
    fetch: FetchConfig = FetchConfig()
    ray: RayConfig = RayConfig()
    seed: int = Field(default=0, ge=0)  # of the shuffle and of the splits
    max_failed: float = Field(default=0.2, ge=0, le=1)  # share of inputs that may fail before the build gives up

    @model_validator(mode="after")
    def _fits(self) -> PrepConfig:
        if self.caption.min_chars > self.caption.max_chars:
            raise ValueError("caption.min_chars is larger than caption.max_chars")
        if self.source.split_column is not None and "splits" in self.model_fields_set:
            raise ValueError("splits and source.split_column exclude each other: remove one")
        return self

    def content_settings(self) -> dict[str, Any]:
        """The settings that decide the shards' bytes, as plain data."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in self.RUN_ONLY}
