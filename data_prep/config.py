"""Options of a data set build: what `vitrail prep CONFIG` reads.

Everything that decides the shards' bytes is part of the build's fingerprint; the rest (`RUN_ONLY`) may change between
a build and its rerun.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config import Config

SPLIT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class TableConfig(Config):
    """Pairs listed in a table: one row per image, the columns chosen by name.

    An image's URL may be relative to the table's folder, an absolute path, `s3://`, or `https://` and `http://`.
    Tables are often somebody else's, so a row may name only places below the table's folder, in the table's bucket, or
    below one of `allow`; others are counted as failures (`place_not_allowed`). Web addresses have rules of their own
    (`fetch.web`).
    """

    type: Literal["table"] = "table"
    url: str  # a file, or a folder of files of one format, taken in the order of their names
    format: Literal["auto", "parquet", "csv", "tsv", "jsonl"] = "auto"  # auto: by the name's ending; .gz may follow
    url_column: str = "url"
    # One column, whose cells may be lists, or several; None: images without captions, no `txt` members.
    caption_column: str | tuple[str, ...] | None = "caption"
    label_column: str | None = None  # an integer, or a name out of `classes`
    split_column: str | None = None  # the row's split by name; None: `splits`
    annotations_column: str | None = None  # JSON: a list of COCO annotations in pixels of the upright image
    keep_columns: tuple[str, ...] = ()  # go into each sample's `json` and sidecar row as they are
    classes: tuple[str, ...] | str = ()  # names of the labels 0, 1, ..., or where a JSON list of them lies
    allow: tuple[str, ...] = ()  # further folders and s3:// prefixes that rows may name


class FolderConfig(Config):
    """All images below a folder or s3:// prefix, each with its `.txt` (caption) or `.json` beside it.

    A `.json` may hold `caption`, or the field named by `caption_field`; the rest of it is left alone.
    """

    type: Literal["folder"]
    url: str
    captions: Literal["txt", "json", "none"] = "txt"
    caption_field: str = "caption"  # of the json
    allow: tuple[str, ...] = ()


class ClassFoldersConfig(Config):
    """ImageNet's layout: one folder per class below `url`; labels number the folders in the order of their names."""

    type: Literal["class_folders"]
    url: str
    allow: tuple[str, ...] = ()


class TarsConfig(Config):
    """Existing WebDataset tars, as img2dataset, DataComp or SA-1B make them: their samples are sharded anew.

    A sample is what shares a name up to its first dot. Captions come from `txt`, or from `caption_field` of the
    `json`; `annotations` of the `json` (SA-1B's masks) are kept, `cls` is the label.
    """

    type: Literal["tars"]
    url: str  # a tar, or a folder of them
    captions: Literal["txt", "json", "none"] = "txt"
    caption_field: str = "caption"  # of the json
    labels: bool = False  # take `cls` members
    annotations: bool = False  # take `annotations` of `json` members
    keep_fields: tuple[str, ...] = ()  # of the json; they go into each sample's `json` and sidecar row
    classes: tuple[str, ...] | str = ()
    allow: tuple[str, ...] = ()


class CocoConfig(Config):
    """COCO's instances: images with their objects, and captions where a captions file is given.

    Categories keep the names in `classes`' order, renumbered 0, 1, ... by rising COCO id.
    """

    type: Literal["coco"]
    url: str  # instances_*.json
    images: str  # folder of the images
    captions: str | None = None  # captions_*.json
    allow: tuple[str, ...] = ()


SourceConfig = Annotated[
    TableConfig | FolderConfig | ClassFoldersConfig | TarsConfig | CocoConfig, Field(discriminator="type")
]


class SplitsConfig(Config):
    """How rows without a split column are divided.

    By `content`, all images are read once before anything is written, and equal images land in the same split
    whatever their URLs are; with `dedup.near_distance`, so do alike ones. By `url`, nothing is read, and only equal
    URLs stay together.
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


class DedupConfig(Config):
    """Which images count as the same, over the whole data set, and what becomes of them.

    Alike are images whose perceptual hashes (64 bits, `data_prep.duplicates.signatures`) differ in at most
    `near_distance` bits.
    """

    drop: Literal["none", "exact", "near"] = "none"  # of equal (or alike) images the first input stays
    near_distance: int = Field(default=4, ge=0, le=16)  # bits; used by `near`, by splits and by decontamination
    near_splits: bool = False  # without dropping them, keep alike images in one split
    # Images of these data sets (ours, by manifest) or folders are refused: equal or alike ones.
    evaluation: tuple[str, ...] = ()

    @property
    def looks_at_pixels(self) -> bool:
        """Whether perceptual hashes are needed."""
        return self.drop == "near" or self.near_splits or bool(self.evaluation)


class ImageConfig(Config):
    """What is done to the images, and which are refused."""

    # keep_ratio: the shorter side becomes `size`; keep_ratio_largest: the longer one; center_crop: a square out of
    # the middle; border: the longer side becomes `size`, white bars make a square of it.
    resize: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = "keep_ratio"
    size: int = Field(default=256, gt=0)  # pixels
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


class ScoreFilter(Config):
    """Refuses pairs whose image and caption a CLIP model finds unlike (`score_too_low`).

    The score is the cosine similarity, between -1 and 1. Give either an open_clip model or a run of stage `flip`.
    """

    type: Literal["clip_score"]
    min_score: float = Field(ge=-1, le=1)
    model: str | None = None  # open_clip's name, such as ViT-B-32
    pretrained: str | None = None  # open_clip's tag or a weights file; a model of a hub, such as hf-hub:..., needs none
    run: str | None = None  # run directory of stage flip, whose newest checkpoint is taken
    batch: int = Field(default=64, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where Ray has one

    @model_validator(mode="after")
    def _one_model(self) -> ScoreFilter:
        if (self.model is None) == (self.run is None):
            raise ValueError("give either model (with pretrained) or run")
        if self.model is not None and self.pretrained is None and ":" not in self.model:
            raise ValueError(f"{self.model} has no weights yet: give pretrained, open_clip's tag or a file")
        return self


class FunctionFilter(Config):
    """A user's own `function(candidate) -> bool | str` by dotted name: see `data_prep.filters.judge.Candidate`.

    True keeps the pair; False or a text, which is noted, refuses it (`function_refused`). What it raises stops the
    build. It must be importable on every machine.
    """

    type: Literal["function"]
    name: str


FilterConfig = Annotated[ScoreFilter | FunctionFilter, Field(discriminator="type")]


class WebConfig(Config):
    """How and from whom http(s) URLs are read."""

    timeout_s: float = Field(default=20.0, gt=0)  # for one object in all: connecting, body, retries and waits
    per_host: int = Field(default=8, gt=0)  # connections to one host, of the whole build
    user_agent: str = "vitrail"  # add an address where hosts can reach you
    # `noai`-like words of the X-Robots-Tag header that mean "don't take this", after img2dataset.
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    max_redirects: int = Field(default=5, ge=0)
    # Only public addresses are connected to: a table could otherwise have this network's inside read for it.
    allow_networks: tuple[str, ...] = ()  # private networks that may be read all the same, as 10.1.0.0/16
    ports: tuple[int, ...] = (80, 443)  # of public hosts; networks in `allow_networks` may use any

    @field_validator("allow_networks")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network)
        return value


class FetchConfig(Config):
    """How source images are read."""

    max_bytes: int = Field(default=64 * 2**20, gt=0)
    retries: int = Field(default=3, ge=0)  # after answers that may pass
    concurrency: int = Field(default=32, gt=0)  # reads under way per task
    web: WebConfig = WebConfig()


class ShardConfig(Config):
    """How samples are packed. A task holds one whole shard in memory."""

    samples: int = Field(default=5000, gt=0)  # at most; rows that fail make a shard smaller


class RayConfig(Config):
    """Where the work runs."""

    address: str | None = None  # of a running Ray; None: one of this machine's own
    workers: int | None = Field(default=None, ge=0)  # tasks at once; None: one per CPU; 0: this process, without Ray
    task_retries: int = Field(default=4, ge=0)  # of a task whose worker died
    # Processes for each model filter; None: as many as there are GPUs for, one without any.
    scorers: int | None = Field(default=None, gt=0)


class PrepConfig(Config):
    """One build: from a source to a data set folder with one subfolder per split."""

    # What may differ between a build and the rerun that finishes it.
    RUN_ONLY: ClassVar[frozenset[str]] = frozenset({"name", "output", "fetch", "ray", "max_failed"})

    name: str = "data set"
    output: str  # folder or s3:// prefix
    source: SourceConfig
    splits: SplitsConfig = SplitsConfig()
    dedup: DedupConfig = DedupConfig()
    image: ImageConfig = ImageConfig()
    caption: CaptionConfig = CaptionConfig()
    filters: tuple[FilterConfig, ...] = ()  # applied in this order, each to what the ones before it left
    shard: ShardConfig = ShardConfig()
    fetch: FetchConfig = FetchConfig()
    ray: RayConfig = RayConfig()
    seed: int = Field(default=0, ge=0)  # of the shuffle and of the splits
    max_failed: float = Field(default=0.2, ge=0, le=1)  # share of inputs that may fail before the build gives up

    @model_validator(mode="before")
    @classmethod
    def _tables_are_usual(cls, document: Any) -> Any:
        """A source without a type is a table."""
        source = document.get("source") if isinstance(document, dict) else None
        if isinstance(source, dict) and "type" not in source:
            return document | {"source": {"type": "table", **source}}
        return document

    @model_validator(mode="after")
    def _fits(self) -> PrepConfig:
        if self.caption.min_chars > self.caption.max_chars:
            raise ValueError("caption.min_chars is larger than caption.max_chars")
        if self.own_splits and "splits" in self.model_fields_set:
            raise ValueError("splits and source.split_column exclude each other: remove one")
        return self

    @property
    def own_splits(self) -> bool:
        """Whether the source says which split an input belongs to."""
        return isinstance(self.source, TableConfig) and self.source.split_column is not None

    @property
    def has_captions(self) -> bool:
        """Whether samples have captions."""
        source = self.source
        if isinstance(source, TableConfig):
            return bool(source.caption_column)
        if isinstance(source, CocoConfig):
            return source.captions is not None
        return isinstance(source, FolderConfig | TarsConfig) and source.captions != "none"

    @property
    def has_labels(self) -> bool:
        """Whether samples have labels."""
        source = self.source
        if isinstance(source, TableConfig):
            return source.label_column is not None
        return isinstance(source, ClassFoldersConfig) or (isinstance(source, TarsConfig) and source.labels)

    @property
    def needs_scan(self) -> bool:
        """Whether all images must be looked at before anything is written."""
        by_content = not self.own_splits and self.splits.by == "content" and len(self.splits.shares) > 1
        return by_content or self.dedup.drop != "none" or bool(self.dedup.evaluation)

    def content_settings(self) -> dict[str, Any]:
        """The settings that decide the shards' bytes, as plain data."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in self.RUN_ONLY}
