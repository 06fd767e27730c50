"""What is decided over several segments: which inputs are tried again, and which are duplicates of which."""

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
from data_prep.duplicates.dedup import JudgedInputs, decide
from data_prep.plan.segments import Segment, read_positions
from data_prep.shards import finish
from pipeline import storage
from pipeline.errors import ConfigError


def checked(reasons: Sequence[str]) -> tuple[str, ...]:
    """The reasons to retry, without repetitions.

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
    """Positions of the inputs that are refused for one of the reasons, in rising order."""
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
        positions = list(pool.map(read, places))
    return np.sort(np.concatenate([np.zeros(0, np.int64), *positions]))


def judge(config: PrepConfig, segments: Sequence[Segment], stop: Callable[[], bool]) -> JudgedInputs:
    """Decide on the inputs of all segments, in the order in which they came.

    An input that a later segment tries again counts in that segment only.
    """
    url = config.output
    positions: list[Int64[np.ndarray, " k"]] = []
    parts = []
    starts = []
    num_inputs = 0
    for segment in segments:
        retried = read_positions(url, segment)
        positions.append(np.arange(segment.start, segment.stop) if retried is None else retried)
        starts.append(num_inputs)
        num_inputs += segment.num_inputs
        num_chunks = -(-segment.num_inputs // scanning.CHUNK_ROWS)
        for number in range(num_chunks):
            parts.append(scanning.signatures_of(scanning.read_scan(url, segment.number, number)))
    images = scanning.joined(parts)
    for number, segment in enumerate(segments):
        if segment.kind == "retry":
            before = np.concatenate(positions[:number])
            images.usable[: starts[number]] &= ~np.isin(before, positions[number])
    evaluation_images = evaluation.signatures(config, stop)
    decisions = decide(images, evaluation_images, config.dedup, config.splits.shares, config.seed)
    return JudgedInputs(decisions, np.concatenate(positions), starts)
