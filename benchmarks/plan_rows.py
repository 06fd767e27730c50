"""How the driver of data preparation scales with rows: the real plan and commit path, samples simulated.

    python -m benchmarks.plan_rows 1000000 10000000

For each number of rows a process of its own streams a table of made-up pairs, plans it, and commits every partition:
staged objects, marker, publishing, manifests and account are the real ones, sidecars have a row for each input, only
fetching and images are left out and archives are empty. Printed are rows per second by phase, and the peak of the
process's memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.machine import REPOSITORY
from data_prep.account import Progress
from data_prep.build import Build
from data_prep.config import PrepConfig
from data_prep.packing import Job
from data_prep.planning import Partition
from data_prep.shards import SIDECAR_SCHEMA, Committed, commit, json_bytes, stage_packed
from data_prep.sources import SCHEMA, Places
from pipeline.config import validate

BATCH_ROWS = 65_536
ROW_BYTES = 90  # of a listing


class MadeUpSource:
    """Pairs of a URL and a caption by number, as a table's source gives them."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def check(self) -> None:
        """Nothing can be wrong."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        for start in range(0, self._rows, BATCH_ROWS):
            numbers = pa.array(range(start, min(start + BATCH_ROWS, self._rows)), pa.int64())
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

    def places(self) -> Places:
        return Places("/", ("/",))

    def classes(self) -> tuple[str, ...]:
        return ()


def simulate(job: Job, partition: Partition) -> Committed:
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
    offsets = np.arange(rows + 1, dtype=np.int64)
    packed = (bytes(rows + 1024), offsets, json_bytes({"count": rows}))
    place = (job.segment, partition.split, partition.number)
    table = pa.table(columns, schema=SIDECAR_SCHEMA)
    return commit(job.config.output, stage_packed(job.config.output, place, packed, table, {}, {}, job.fingerprint))


def measure(rows: int, samples: int, folder: str) -> dict[str, float]:
    """Plan and commit in this process."""
    document = {
        "output": folder,
        "source": {"type": "table", "url": "made up"},
        "shard": {"samples": samples},
        "ray": {"workers": 0},
        "max_failed": 1.0,
    }
    phases: dict[str, list[float]] = {}

    def note(progress: Progress) -> None:
        phases.setdefault(progress.phase, []).append(time.monotonic())
        del phases[progress.phase][1:-1]

    started = time.monotonic()
    build = Build(validate(PrepConfig, document, where="benchmark"), MadeUpSource(rows), progress=note, pack=simulate)
    report = build.run()
    assert report.inputs == report.written == rows
    ended = time.monotonic()
    return {
        "rows": rows,
        "shards": report.splits["train"].shards,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rows_per_s": rows / (ended - started),
        "plan_s": phases["plan"][-1] - started,
        "write_s": phases["write"][-1] - phases["plan"][-1],
        "publish_s": ended - phases["write"][-1],
        "cpu_s": time.process_time(),
    }


def main() -> int:
    """Measure each number of rows given, each in a process of its own."""
    if sys.argv[1:2] == ["--one"]:
        with tempfile.TemporaryDirectory(prefix="vitrail-rows-") as folder:
            print(json.dumps(measure(int(sys.argv[2]), int(sys.argv[3]), str(Path(folder) / "out"))))
        return 0
    for rows in map(int, sys.argv[1:] or ["10000", "1000000"]):
        samples = max(1000, min(10_000, rows // 10))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.plan_rows", "--one", str(rows), str(samples)],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        print(done.stdout.strip() or done.stderr[-3000:], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
