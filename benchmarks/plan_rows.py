"""How the driver of data preparation scales with rows: the real plan and commit path, samples simulated.

    python -m benchmarks.plan_rows 1000000 10000000

For each number of rows a process of its own streams a table of made-up pairs, plans it, and commits every partition:
staged objects, marker, publishing, manifests and account are the real ones, and sidecars have a row for each input.
Only fetching and images are left out: an archive holds the few samples that the report shows, and one byte for each
other sample. Wall and CPU seconds by phase and the process's peak memory are written to
benchmarks/results/plan-rows.json. Spilled and committed data take about 100 bytes per row in the folder for temporary
files (`TMPDIR`) meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
from jaxtyping import Int64

from benchmarks.harness import RESULTS
from benchmarks.machine import REPOSITORY, machine, revision, versions
from data_prep.account import Progress
from data_prep.build import Build
from data_prep.config import PrepConfig
from data_prep.plan.planning import Partition
from data_prep.samples.packing import SegmentJob
from data_prep.shards.commit import (
    SIDECAR_SCHEMA,
    Committed,
    PackedPartition,
    PackedSamples,
    Sample,
    ShardWriter,
    commit,
    json_bytes,
    sample_key,
    stage,
)
from data_prep.shards.page import NUM_SAMPLES
from data_prep.sources.base import BATCH_ROWS, SCHEMA, AllowedPlaces
from pipeline.config import validate

FORMAT, FORMAT_VERSION = "vitrail.plan_rows", 1
ROW_BYTES = 90  # of a listing


class MadeUpSource:
    """Pairs of a URL and a caption by number, as a table's source gives them."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def check(self) -> None:
        """Rows that are made up are always right."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        for start in range(0, self._rows, BATCH_ROWS):
            numbers = pa.array(np.arange(start, min(start + BATCH_ROWS, self._rows)))
            text = numbers.cast(pa.string())
            columns = {
                "position": numbers,
                "url": pc.binary_join_element_wise("https://images.example.org/photos/", text, ".jpg", "").cast(
                    "binary"
                ),
                "caption": pc.binary_join_element_wise("a photo of number", text, " ").cast("binary"),
            }
            arrays = [columns.get(field.name, pa.nulls(len(numbers), field.type)) for field in SCHEMA]
            yield pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)

    def size_bytes(self) -> int:
        return ROW_BYTES * self._rows

    def places(self) -> AllowedPlaces:
        return AllowedPlaces("/", ("/",))

    def classes(self) -> tuple[str, ...]:
        return ()


@functools.cache
def _few_samples() -> tuple[bytes, Int64[np.ndarray, " n_plus_1"]]:
    """An archive of as many samples as the report shows, and their offsets."""
    writer = ShardWriter()
    image = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    for number in range(NUM_SAMPLES):
        writer.add(Sample(sample_key(number), {"jpg": image, "txt": b"a photo"}))
    return writer.finish()


def simulate(job: SegmentJob, partition: Partition) -> Committed:
    """Commit a partition as if every input had become an empty sample."""
    inputs = partition.inputs
    rows = inputs.num_rows
    known = {
        "url": inputs.column("url").cast(pa.string()),
        "caption": inputs.column("caption").cast(pa.string()),
        "key": pc.utf8_lpad(inputs.column("position").cast(pa.string()), 12, "0"),
        "status": pa.repeat("success", rows),
        "reason": pa.repeat("", rows),
        "position": inputs.column("position"),
    }
    columns = [known.get(field.name, pa.nulls(rows, field.type)) for field in SIDECAR_SCHEMA]
    archive, offsets = _few_samples()
    rest = max(0, rows + 1 - len(offsets))  # one byte each, since an index must rise
    offsets = np.concatenate([offsets[: rows + 1], offsets[-1] + np.arange(1, rest + 1)])
    packed = PackedSamples(archive + bytes(rest), offsets, json_bytes({"count": rows}))
    place = (job.segment, partition.split, partition.number)
    table = pa.table(columns, schema=SIDECAR_SCHEMA)
    partition_objects = PackedPartition(place, job.fingerprint, packed, table, {}, {})
    return commit(job.config.output, stage(job.config.output, partition_objects))


def measure(rows: int, samples: int, folder: str) -> dict[str, float]:
    """Plan and commit in this process."""
    document = {
        "output": folder,
        "source": {"type": "table", "url": "made up"},
        "shard": {"samples": samples},
        "ray": {"tasks": 0},
        "max_failed": 1.0,
    }
    ends: dict[str, tuple[float, float]] = {}  # of each phase: wall and CPU seconds
    started = (time.monotonic(), time.process_time())

    def note(progress: Progress) -> None:
        ends[progress.phase] = (time.monotonic(), time.process_time())

    build = Build(validate(PrepConfig, document, where="benchmark"), MadeUpSource(rows), progress=note, pack=simulate)
    report = build.run()
    if not report.inputs == report.written == rows:
        raise RuntimeError(f"{report.written} of {rows} rows were written")
    ends["publish"] = (time.monotonic(), time.process_time())
    figures: dict[str, float] = {
        "rows": rows,
        "shards": report.splits["train"].shards,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rows_per_s": rows / (ends["publish"][0] - started[0]),
        "rows_per_cpu_s": rows / (ends["publish"][1] - started[1]),
    }
    begun = started
    for phase in ("plan", "write", "publish"):
        figures |= {f"{phase}_s": ends[phase][0] - begun[0], f"{phase}_cpu_s": ends[phase][1] - begun[1]}
        begun = ends[phase]
    return {key: round(value, 2) for key, value in figures.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measure each number of rows in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_rows", description=__doc__)
    parser.add_argument("rows", type=int, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=RESULTS / "plan-rows.json", help="where the figures go")
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)  # given: measure in this process
    options = parser.parse_args(arguments)
    if options.samples:
        with tempfile.TemporaryDirectory(prefix="vitrail-rows-") as folder:
            print(json.dumps(measure(options.rows[0], options.samples, str(Path(folder) / "out"))))
        return 0
    figures = []
    for rows in options.rows:
        samples = max(1000, min(10_000, rows // 10))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.plan_rows", str(rows), f"--samples={samples}"],
            cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            return done.returncode
        print(done.stdout.strip(), flush=True)
        figures.append(json.loads(done.stdout))
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.plan_rows", *map(str, options.rows)]),
        "git": revision(),
        "machine": machine(),
        "versions": versions(),
        "figures": figures,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
