"""The order of samples: 5 billion of them, and how well it shuffles, against a full permutation.

- `order-5e9`: laying out an epoch of 5 billion samples in 500,000 shards and looking up 100 global batches, against
  numpy's full permutation of a hundredth as many. The notes hold memory and the time of one look-up.
- `order-quality`: a million samples in order. The notes hold, for both, how far a sample travels, how alike neighbours
  are, and how classes run where the data are sorted by class.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from typing import Any

import numpy as np

from benchmarks.harness import Comparison, Contender, Goal, Work, compare
from pipeline.data.order.permutation import Cursor, Order

Ids = np.ndarray[Any, np.dtype[np.int64]]

NUM_SAMPLES, NUM_SHARDS, GLOBAL_BATCH, LOOKUPS = 5_000_000_000, 500_000, 4096, 100
NUM_CLASSES, QUALITY_BATCH = 1000, 256


def run(pairs: int) -> list[Comparison]:
    """See the module's docstring."""
    return [five_billion(min(pairs, 3)), quality(min(pairs, 3))]


def five_billion(pairs: int) -> Comparison:
    """Build and look up."""
    facts: dict[str, Any] = {}

    def ours() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        sizes = [NUM_SAMPLES // NUM_SHARDS] * NUM_SHARDS
        order = Order(sizes, seed=0, block=256, lanes=64, window=4096)
        order.slots(Cursor(0, 0), GLOBAL_BATCH)
        facts["build_s"] = round(time.perf_counter() - began, 2)
        facts.setdefault("peak_mb", round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
        facts["kept_mb"] = round(order.size_bytes / 2**20)
        began = time.perf_counter()
        for i in range(1, LOOKUPS + 1):
            order.slots(Cursor(0, i * (NUM_SAMPLES // (LOOKUPS + 2))), GLOBAL_BATCH)
        facts["lookup_us_a_sample"] = round((time.perf_counter() - began) / LOOKUPS / GLOBAL_BATCH * 1e6, 2)
        facts["lookup_ms_a_batch"] = round((time.perf_counter() - began) / LOOKUPS * 1e3, 2)
        return LOOKUPS * GLOBAL_BATCH

    def peer() -> int:
        permutation = np.random.default_rng(0).permutation(NUM_SAMPLES // 100)
        return sum(len(permutation[i * GLOBAL_BATCH :][:GLOBAL_BATCH]) for i in range(LOOKUPS))

    return compare(
        "order-5e9",
        f"an epoch of {NUM_SAMPLES:,} samples laid out and {LOOKUPS} global batches of {GLOBAL_BATCH} looked up",
        Contender("pipeline.data.order.permutation", ours),
        Contender(f"numpy's permutation of {NUM_SAMPLES // 100:,}", peer),
        check=lambda ours, peer: ours == peer,
        pairs=pairs,
        goal=Goal(ours_max_s=10.0),
        notes=facts,
    )


def quality(pairs: int) -> Comparison:
    """Shuffle a million samples, sorted by class, in shards of 10,000."""
    count = 1_000_000
    outcome: dict[str, Ids] = {}

    def ours() -> int:
        order = Order([10_000] * (count // 10_000), seed=1, block=256, lanes=16, window=1024)
        outcome["ours"] = order.ids(0, np.arange(count))
        return int(outcome["ours"].sum())

    def peer() -> int:
        outcome["permutation"] = np.random.default_rng(1).permutation(count)
        return int(outcome["permutation"].sum())

    comparison = compare(
        "order-quality",
        f"{count:,} samples in order of {NUM_CLASSES} classes, blocks of 256, 16 lanes, windows of 1024",
        Contender("pipeline.data.order.permutation", ours),
        Contender("numpy's full permutation", peer),
        check=lambda ours, peer: ours == peer == count * (count - 1) // 2,
        pairs=pairs,
        work=Work(count, "samples"),
    )
    return dataclasses.replace(comparison, notes={side: measures(ids) for side, ids in outcome.items()})


def measures(ids: Ids, num_classes: int = NUM_CLASSES, batch: int = QUALITY_BATCH) -> dict[str, float]:
    """How well `ids` (0 .. n-1, sorted by class) are shuffled.

    - `travel`: mean distance of a sample from its place in the data, over n; 1/3 for a full permutation.
    - `neighbour_correlation`: of the ids of neighbours in the stream; 0.
    - `same_block`: share of pairs at most 16 apart in the stream that were within 256 of each other in the data;
      512 / n.
    - `classes_in_batch`: mean number of different classes in a batch.
    - `class_excess`: variance of a class's count in a batch over that of a draw without replacement; 1.
    - `longest_class_run`: most samples of one class in a row.
    """
    count = len(ids)
    classes = ids * num_classes // count
    near = [float((np.abs(ids[gap:] - ids[:-gap]) < 256).mean()) for gap in range(1, 17)]
    batches = classes[: count // batch * batch].reshape(-1, batch)
    counts = np.stack([np.bincount(row, minlength=num_classes) for row in batches])
    share = 1 / num_classes
    drawn = batch * share * (1 - share) * (count - batch) / (count - 1)
    runs = np.diff(np.flatnonzero(np.diff(classes, prepend=-1, append=-1)))
    return {
        "travel": round(float(np.abs(ids - np.arange(count)).mean()) / count, 4),
        "neighbour_correlation": round(float(np.corrcoef(ids[:-1], ids[1:])[0, 1]), 4),
        "same_block": round(float(np.mean(near)), 6),
        "classes_in_batch": round(float((counts > 0).sum(axis=1).mean()), 2),
        "class_excess": round(float(counts.var() / drawn), 3),
        "longest_class_run": int(runs.max()),
    }
