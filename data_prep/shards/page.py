"""The end report of a build: one small HTML page beside `prep.json`, without scripts and with nothing loaded.

Counts by reason with an example of each, histograms of sizes and caption lengths, and a grid of samples. Everything
that comes from the data is escaped: captions are strangers' text.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from data_prep.account import REASONS, PrepReport
from pipeline import storage
from pipeline.data.images.decode import UnreadableSample, decode
from pipeline.data.manifest import Manifest
from pipeline.data.reading.tar import first_image

PAGE_NAME = "report.html"
NUM_SIDECARS = 20  # that histograms are made of, spread over each split
NUM_SAMPLES = 24  # shown
_THUMBNAIL = 160  # pixels
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}td.e{color:#666;font-size:.85em;overflow-wrap:anywhere}
.bars div{display:flex;gap:.5rem;align-items:center}.bars span{width:9rem;text-align:right;font-size:.85em}
.bars i{background:#36a;height:.8rem;display:block}.grid{display:flex;flex-wrap:wrap;gap:.8rem}
figure{margin:0;width:160px}figcaption{font-size:.8em;overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td,th{border-color:#444}}
"""


def write_page(report: PrepReport, manifests: Mapping[str, Manifest]) -> None:
    """Write the report of a finished build into its folder."""
    tables = [_sidecars(manifest) for manifest in manifests.values()]
    columns = pa.concat_tables(tables) if tables else None
    parts = [
        f"<h1>{_text(report.name)}</h1>",
        f"<p>{report.inputs:,} inputs = {report.written:,} written + {sum(report.filtered.values()):,} filtered + "
        f"{sum(report.failed.values()):,} failed</p>",
        _reasons(report),
        _splits(report),
    ]
    if columns is not None:
        parts += _histograms(columns)
    parts.append("<h2>Samples</h2><div class='grid'>")
    for manifest in manifests.values():
        parts += [_figure(image, caption) for image, caption in _some(manifest, NUM_SAMPLES // len(manifests) or 1)]
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_text(report.name)}</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</div></body></html>\n"
    )
    storage.write(storage.join(report.url, PAGE_NAME), page.encode("utf-8", "replace"))


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _reasons(report: PrepReport) -> str:
    rows = [f"<tr><td>written<td class='n'>{report.written:,}<td><td>"]
    for reason, meaning in REASONS.items():
        count = report.filtered.get(reason, 0) + report.failed.get(reason, 0)
        if count:
            kind = "filtered" if meaning.filtered else "failed"
            example = _text(report.examples.get(reason, ""))
            rows.append(f"<tr><td>{_text(reason)}<td class='n'>{count:,}<td>{kind}<td class='e'>{example}")
    return f"<table><tr><th>outcome<th class='n'>inputs<th><th>example{''.join(rows)}</table>"


def _splits(report: PrepReport) -> str:
    rows = [
        f"<tr><td>{_text(name)}"
        + "".join(
            f"<td class='n'>{cell}" for cell in (f"{s.samples:,}", f"{s.shards:,}", f"{s.size_bytes / 2**20:,.1f}")
        )
        for name, s in report.splits.items()
    ]
    head = "<tr><th>split<th class='n'>samples<th class='n'>shards<th class='n'>MiB"
    return f"<table>{head}{''.join(rows)}</table>"


def _sidecars(manifest: Manifest) -> pa.Table:
    """Sizes and captions of the successes in some of the split's sidecars."""
    names = [shard.name.removesuffix(".tar") + ".parquet" for shard in manifest.shards]
    chosen = names[:: max(1, len(names) // NUM_SIDECARS)][:NUM_SIDECARS]
    columns = ["status", "caption", "width", "height", "original_width", "original_height"]
    tables = [
        pyarrow.parquet.read_table(io.BytesIO(storage.read(storage.join(manifest.url, name))), columns=columns)
        for name in chosen
    ]
    found = pa.concat_tables(tables)
    return found.filter(pa.compute.equal(found.column("status"), "success"))


def _histograms(table: pa.Table) -> Iterable[str]:
    def side(prefix: str) -> np.ndarray:
        width, height = (table.column(f"{prefix}{name}").to_numpy() for name in ("width", "height"))
        shorter: np.ndarray = np.minimum(width, height)
        return shorter

    yield f"<p>The histograms show {table.num_rows:,} samples.</p>"
    yield _bars("Shorter side of the sources, pixels", side("original_"))
    yield _bars("Shorter side as stored, pixels", side(""))
    lengths = pa.compute.utf8_length(table.column("caption")).drop_null().to_numpy()
    if len(lengths):
        yield _bars("Length of captions, characters", lengths)


def _bars(title: str, values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    low, high = int(values.min()), int(values.max()) + 1
    edges = np.unique(np.linspace(low, high, 13).round().astype(int))
    counts, edges = np.histogram(values, edges)
    most = max(1, int(counts.max()))
    rows = [
        f"<div><span>{start:,}–{stop - 1:,}</span><i style='width:{300 * count / most:.0f}px'></i>{count:,}</div>"
        for count, (start, stop) in zip(counts.tolist(), itertools.pairwise(edges.tolist()), strict=True)
    ]
    return f"<h2>{title}</h2><div class='bars'>{''.join(rows)}</div>"


def _some(manifest: Manifest, count: int) -> Iterable[tuple[bytes, str]]:
    """(image, caption) of the first samples, in shards' order, which is shuffled."""
    from data_prep.shards.verify import first_members  # it reads what `finish` writes, which writes this page

    for _, _, members in first_members(manifest, count):
        yield first_image(members) or b"", members.get("txt", b"").decode("utf-8", "replace")


def _figure(image: bytes, caption: str) -> str:
    try:
        small = Image.fromarray(decode(image, (_THUMBNAIL, _THUMBNAIL)))
    except UnreadableSample:
        return ""
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    shown = caption if len(caption) <= 120 else caption[:119] + "…"
    source = base64.b64encode(buffer.getvalue()).decode()
    return f"<figure><img alt='' src='data:image/jpeg;base64,{source}'><figcaption>{_text(shown)}</figcaption></figure>"
