"""`vitrail index`: existing tars as a data set, and what is to be known about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_prep.indexing.index import IndexOptions, IndexResult, index_tars
from data_prep.sources.base import read_classes
from launch.stopping import StopRequest

_SHOWN_NAMES = 3


def index_dataset(
    url: str,
    *,
    to: str | None,
    match: str,
    classes: str | None,
    skip_bad: bool,
    workers: int,
    stop: StopRequest,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[str]]:
    """Index the tars below `url`: the account as a document and as lines.

    Raises:
        UserError: see `data_prep.indexing.index.index_tars`; or the class names can't be read.
        Stopped: it was asked to; the same command goes on.
    """
    names = () if classes is None else read_classes(classes)
    indexed = index_tars(IndexOptions(url, to, match, names, skip_bad, workers), say=say, stop=stop.requested)
    return indexed.document(), _lines(indexed)


def _lines(indexed: IndexResult) -> list[str]:
    manifest, facts = indexed.manifest, indexed.facts
    size = sum(shard.size_bytes for shard in manifest.shards)
    lines = [f"{manifest.num_samples} samples in {len(manifest.shards)} tars, {size / 2**20:.1f} MiB"]
    lines.append("members: " + ", ".join(f"{count} {kind}" for kind, count in facts["members"].items()))
    if manifest.classes:
        lines.append(f"{facts['labels']} labels of {len(manifest.classes)} classes")
    elif facts["labels"]:
        lines.append(f"{facts['labels']} labels, too high for class numbers: no classes")
    examples = facts["examples"]
    for kind, count in facts["unread"].items():
        such = f", such as {examples[kind]}" if kind in examples else ""
        lines.append(f"no stage reads: {count} {kind}{such}")
    for what, meaning in (
        ("without_image", "samples without an image, whose slots will count nothing"),
        ("several_images", "samples with several images, of which the first of jpg, jpeg, png, webp is read"),
        ("bad_labels", "labels that are no class numbers"),
    ):
        if facts[what]:
            lines.append(f"{facts[what]} {meaning}, such as {examples[what]}")
    if facts["empty"]:
        lines.append(f"{len(facts['empty'])} tars without samples: {_names(facts['empty'])}")
    if facts["left_out"]:
        lines.append(f"{len(facts['left_out'])} tars left out: {_names(facts['left_out'])}")
    if indexed.already:
        lines.append(f"indexed already, nothing has changed: {manifest.url}")
    else:
        lines.append(f"data set: {manifest.url}")
    return lines


def _names(names: list[str] | dict[str, str]) -> str:
    shown = [f"{name} ({names[name]})" if isinstance(names, dict) else name for name in list(names)[:_SHOWN_NAMES]]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
