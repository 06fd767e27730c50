"""The end report of a build: one small HTML page beside `prep.json`, without scripts and with nothing loaded.

Counts by reason with an example of each, histograms of sizes and caption lengths, and a grid of samples. The template
escapes everything that comes from the data: captions are strangers' text.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from data_prep.account import REASONS, PrepReport
from data_prep.shards.contents import first_members
from pipeline import storage
from pipeline.data.images.decode import UnreadableSample, decode
from pipeline.data.manifest import Manifest
from pipeline.data.reading.tar import first_image
from pipeline.pages.bars import Bar, scale_bars
from pipeline.pages.numbers import count
from pipeline.pages.render import render_page

PAGE_NAME = "report.html"
NUM_SIDECARS = 20  # that histograms are made of, spread over each split
NUM_SAMPLES = 24  # shown
_THUMBNAIL = 160  # pixels
_NUM_BINS = 12


class _ReasonCount(NamedTuple):
    """How many inputs were left out for one reason, and an example."""

    reason: str
    num_inputs: int
    kind: str
    example: str


class _Sample(NamedTuple):
    """A sample's thumbnail, as base64 of a JPEG, and its caption."""

    jpeg: str
    caption: str


def write_page(report: PrepReport, manifests: Mapping[str, Manifest]) -> None:
    """Write the report of a finished build into its folder."""
    tables = [_sidecars(manifest) for manifest in manifests.values()]
    columns = pa.concat_tables(tables) if tables else None
    page = render_page(
        "data_prep.shards",
        "build.html.jinja",
        title=report.name,
        report=report,
        outcomes=list(_outcomes(report)),
        num_measured=columns.num_rows if columns is not None else 0,
        histograms=_histograms(columns) if columns is not None else {},
        samples=[
            sample
            for manifest in manifests.values()
            for sample in _samples(manifest, NUM_SAMPLES // len(manifests) or 1)
        ],
    )
    storage.write(storage.join(report.url, PAGE_NAME), page.encode("utf-8", "replace"))


def _outcomes(report: PrepReport) -> Iterator[_ReasonCount]:
    for reason, meaning in REASONS.items():
        num_inputs = report.filtered.get(reason, 0) + report.failed.get(reason, 0)
        if num_inputs:
            kind = "filtered" if meaning.filtered else "failed"
            yield _ReasonCount(reason, num_inputs, kind, report.examples.get(reason, ""))


def _sidecars(manifest: Manifest) -> pa.Table:
    """Sizes and captions of the samples in some of the split's sidecars."""
    names = [shard.name.removesuffix(".tar") + ".parquet" for shard in manifest.shards]
    chosen = names[:: max(1, len(names) // NUM_SIDECARS)][:NUM_SIDECARS]
    columns = ["status", "caption", "width", "height", "original_width", "original_height"]
    tables = [
        pyarrow.parquet.read_table(io.BytesIO(storage.read(storage.join(manifest.url, name))), columns=columns)
        for name in chosen
    ]
    samples = pa.concat_tables(tables)
    return samples.filter(pa.compute.equal(samples.column("status"), "success"))


def _histograms(table: pa.Table) -> dict[str, list[Bar]]:
    """Bars by title; columns without values are left out."""

    def shorter_side(prefix: str) -> np.ndarray:
        width, height = (table.column(f"{prefix}{name}").to_numpy() for name in ("width", "height"))
        shorter: np.ndarray = np.minimum(width, height)
        return shorter

    columns = {
        "Shorter side of the sources, pixels": shorter_side("original_"),
        "Shorter side as stored, pixels": shorter_side(""),
        "Length of captions, characters": pa.compute.utf8_length(table.column("caption")).drop_null().to_numpy(),
    }
    bars = {title: _bars(values) for title, values in columns.items()}
    return {title: rows for title, rows in bars.items() if rows}


def _bars(values: np.ndarray) -> list[Bar]:
    """How many whole numbers lie in each of at most `_NUM_BINS` equal stretches."""
    values = values[np.isfinite(values)]
    if not len(values):
        return []
    low, high = int(values.min()), int(values.max()) + 1
    edges = np.unique(np.linspace(low, high, _NUM_BINS + 1).round().astype(int))
    counts, edges = np.histogram(values, edges)
    return scale_bars(
        [
            Bar(f"{start:,}" if stop == start + 1 else f"{start:,}–{stop - 1:,}", num, count(num))
            for num, (start, stop) in zip(counts.tolist(), itertools.pairwise(edges.tolist()), strict=True)
        ]
    )


def _samples(manifest: Manifest, num_samples: int) -> Iterator[_Sample]:
    """The first samples that can be decoded, in the order of the shards, which is shuffled."""
    for _, _, members in first_members(manifest, num_samples):
        try:
            pixels = decode(first_image(members) or b"", (_THUMBNAIL, _THUMBNAIL))
        except UnreadableSample:
            continue
        thumbnail = Image.fromarray(pixels)
        thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        thumbnail.save(buffer, "JPEG", quality=80)
        caption = members.get("txt", b"").decode("utf-8", "replace")
        yield _Sample(base64.b64encode(buffer.getvalue()).decode(), caption)
