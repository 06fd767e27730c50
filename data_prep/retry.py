"""What is decided over several segments: which inputs are tried once more, and who is whose duplicate."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from jaxtyping import Int64

from data_prep.account import REASONS
from data_prep.config import PrepConfig
from data_prep.duplicates import evaluation, scanning
from data_prep.duplicates.dedup import Decisions, decide
from data_prep.plan.segments import Segment, read_positions
from data_prep.shards import finish
from data_prep.sources.base import Source
from pipeline import storage
from pipeline.errors import ConfigError


def checked(reasons: Sequence[str]) -> tuple[str, ...]:
    """Reasons to retry, each known.

    Raises:
        ConfigError: there is no such reason.
    """
    for reason in reasons:
        if reason not in REASONS:
            close = difflib.get_close_matches(reason, REASONS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"give one of: {', '.join(REASONS)}"
            raise ConfigError(f"no reason {reason!r}", where="--retry", fix=hint)
    return tuple(dict.fromkeys(reasons))


def refused_positions(url: str, segments: Sequence[Segment], reasons: Sequence[str]) -> Int64[np.ndarray, " p"]:
    """Positions of the inputs that stand refused for one of the reasons, rising."""
    wanted = set(reasons)
    places = [
        storage.join(url, split, item.sidecar)
        for split, items in finish.named(finish.read_markers(url, segments).values()).items()
        for item in items
        if wanted & set(item.part.refused)
    ]

    def read(place: str) -> Any:
        table = pyarrow.parquet.read_table(io.BytesIO(storage.read(place)), columns=["position", "reason"])
        return table.filter(pc.is_in(table.column("reason"), pa.array(list(reasons)))).column("position").to_numpy()

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(read, places))
    return np.sort(np.concatenate([np.zeros(0, np.int64), *found]))


def judge(
    config: PrepConfig, url: str, segments: Sequence[Segment], source: Source, stop: Callable[[], bool]
) -> tuple[Decisions, Int64[np.ndarray, " n"], list[int]]:
    """Decisions on the inputs of all segments in the order in which they came, their positions, and where in that
    order each segment begins. An input that a later segment tries again counts there alone.
    """
    positions: list[Int64[np.ndarray, " k"]] = []
    parts = []
    starts = []
    seen = 0
    for segment in segments:
        retried = read_positions(url, segment)
        positions.append(np.arange(segment.start, segment.stop) if retried is None else retried)
        starts.append(seen)
        seen += segment.num_inputs
        number_of_chunks = -(-segment.num_inputs // scanning.CHUNK_ROWS)
        for number in range(number_of_chunks):
            parts.append(scanning.signatures_of(scanning.read_scan(url, segment.number, number)))
    found = scanning.joined(parts)
    for number, segment in enumerate(segments):
        if segment.kind == "retry":
            before = np.concatenate(positions[:number])
            found.usable[: starts[number]] &= ~np.isin(before, positions[number])
    wanted = evaluation.signatures(config, url, stop)
    decisions = decide(found, wanted, config.dedup, config.splits.shares, config.seed)
    return decisions, np.concatenate(positions), starts
