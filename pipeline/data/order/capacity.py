"""Whether data, batch, ranks and workers fit each other: found at start, with the settings that would do."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.order.mixture import Data, Shares, TrainingSource, sources_of
from pipeline.errors import ConfigError, DataError

CROWDED_LANE = 4  # readers of one lane from which on it is worth saying


def check_batch(global_batch: int, *, world_size: int, workers: int, lanes: int, copies: int) -> None:
    """Refuse ranks, workers, lanes and copies that a global batch can't be divided among.

    Raises:
        ConfigError: with the settings that would do.
    """
    if global_batch % world_size:
        raise ConfigError(
            f"{world_size} ranks don't divide a global batch of {global_batch}",
            where="data.global_batch",
            fix=f"run on {_near(global_batch, world_size)} ranks, or change the global batch",
        )
    if global_batch % lanes:
        raise ConfigError(
            f"{lanes} lanes don't divide a global batch of {global_batch}",
            where="data.lanes",
            fix=f"set data.lanes to {_near(global_batch, lanes)}",
        )
    share = global_batch // world_size
    if share % copies:
        raise ConfigError(
            f"{copies} crops of each image don't divide the {share} samples of a rank and step",
            where="data.crops_per_image",
            fix=f"set data.crops_per_image to {_near(share, copies)}, or change the global batch",
        )
    if workers > share // copies:
        each = f" of {copies} crops each" if copies > 1 else ""
        raise ConfigError(
            f"{world_size} ranks x {workers} loader workers need {world_size * workers} images a step, a global batch "
            f"has {global_batch // copies}{each}",
            where="data.loader_workers",
            fix=f"set data.loader_workers={share // copies}, or data.global_batch={world_size * workers * copies}",
        )


def check_data(data: Data, global_batch: int, copies: int = 1) -> None:
    """Refuse data sets so small that one global batch would hold a sample twice.

    Raises:
        DataError: naming the batch that would do.
    """
    sources = sources_of(data)
    drawn = global_batch // copies
    shares = Shares([source.share for source in sources])
    for source, most in zip(sources, shares.most(drawn), strict=True):
        if source.num_samples >= most and source.num_samples:
            continue
        if len(sources) == 1:
            raise DataError(
                f"{source.num_samples} samples don't fill a global batch of {global_batch}",
                where=source.manifest.url,
                fix=f"set data.global_batch to at most {source.num_samples * copies}, or give more data"
                if source.num_samples
                else "give a data set that isn't empty",
            )
        raise DataError(
            f"a global batch takes up to {most} of its {source.num_samples} samples, some of them twice",
            where=source.manifest.url,
            fix="give it less weight, or set a smaller data.global_batch"
            if source.num_samples
            else "give a data set that isn't empty, or leave it out",
        )


def advice(global_batch: int, *, world_size: int, workers: int, lanes: int) -> list[str]:
    """What would make reading cheaper, for the log; empty where nothing would."""
    readers = world_size * max(1, workers)
    if readers < CROWDED_LANE * lanes:
        return []
    better = next((n for n in range(readers, global_batch + 1) if global_batch % n == 0), global_batch)
    return [
        f"{readers} readers ({world_size} ranks x {max(1, workers)}) share {lanes} lanes, so every sample is read by "
        f"{-(-readers // lanes)} of them; a new run with data.lanes={better} reads each once"
    ]


def held_bytes(sources: Sequence[TrainingSource], *, world_size: int, workers: int, lanes: int, window: int) -> int:
    """About how many bytes of encoded samples a rank holds: the windows its workers take from, and the next ones."""
    size = sum(shard.size_bytes for source in sources for shard in source.manifest.shards)
    count = sum(source.manifest.num_samples for source in sources)
    windows = len(sources) * (lanes / world_size + max(1, workers))
    return round(windows * window * 1.25 * size / max(count, 1))


def _near(size: int, wanted: int) -> str:
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    below, above = [d for d in divisors if d < wanted][-3:], [d for d in divisors if d > wanted][:3]
    return ", ".join(map(str, below + above))
