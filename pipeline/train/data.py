"""The data sets of a run, and the loader and sweeps over them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from pipeline import ranks
from pipeline.classes import check_evaluation_sets, check_training_sets, shared_classes
from pipeline.data.batch import Batch, Transform
from pipeline.data.loader import Loader, OrderOptions, ReadingOptions, Share, sweep
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.order.capacity import advice, check_batch, check_data
from pipeline.data.order.mixture import TrainingSource, shares_of, sources_of
from pipeline.data.reading.cache import RangeCache
from pipeline.data.reading.takedown import Takedown, read_takedown
from pipeline.errors import DataError
from pipeline.ranks import World
from pipeline.stages.label_use import LabelUse
from pipeline.train.config import DataConfig, SourceConfig

log = logging.getLogger("vitrail")
_NAMED_SHARDS = 1000  # that a checkpoint lists; for more it has a digest


class RunData(NamedTuple):
    """The data sets of a run. Rank 0 alone reads the manifests and lists, and broadcasts them."""

    config: DataConfig
    train: tuple[TrainingSource, ...]
    sets: dict[str, Manifest]  # evaluation sets by name
    takedown: Takedown

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, where all training sets have the same; else ()."""
        return shared_classes(source.manifest.classes for source in self.train)

    @property
    def num_samples(self) -> int:
        """Samples of the training data, drawn ones only."""
        return sum(source.num_samples for source in self.train)

    @property
    def where(self) -> str:
        """The training data, for messages."""
        return ", ".join(source.manifest.url for source in self.train)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of the data: the order of samples can be continued only with the same."""
        sources = [
            {
                "num_samples": source.manifest.num_samples,
                "shards": [[shard.num_samples, shard.sha256] for shard in source.manifest.shards][:_NAMED_SHARDS],
                **_digest_of_many(source.manifest),
                **({} if len(self.train) == 1 else {"share": source.share}),
                **({} if source.subset is None else {"subset": source.subset}),
            }
            for source in self.train
        ]
        return sources[0] if len(sources) == 1 else {"sources": sources}

    def loader(self, transform: Transform, world: World, *, seed: int, micro_batch: int) -> Loader:
        """The loader of this rank's training data."""
        data = self.config
        order = OrderOptions(seed, data.global_batch, data.block, data.lanes, data.window, data.crops_per_image)
        share, reading = Share(world.rank, world.size), self._reading(data.loader_workers)
        return Loader(self.train, transform, order, share, reading=reading, micro_batch=micro_batch)

    def sweep(
        self, name: str, transform: Transform, world: World, *, seed: int, batch: int, workers: int
    ) -> Iterator[Batch]:
        """A rank's share of one pass over a named evaluation set, or over the training data ("train")."""
        data = self.train if name == "train" else sources_of(self.sets[name])
        share, reading = Share(world.rank, world.size), self._reading(workers)
        return sweep(data, transform, share, batch=batch, seed=seed, block=self.config.block, reading=reading)

    def _reading(self, workers: int) -> ReadingOptions:
        return ReadingOptions(workers, self.takedown, self._cache, self.config.max_unreadable)

    @property
    def _cache(self) -> RangeCache | None:
        cache = self.config.cache
        return None if cache is None else RangeCache(cache.folder, int(cache.limit_gb * 1e9))


def read_data(config: DataConfig, world_size: int, stage: str, use: LabelUse | None) -> RunData:
    """Read the manifests and the takedown list of a run on rank 0, check that they can serve it, and broadcast them.

    Args:
        stage: its name, for messages.
        use: how this stage with its options uses labels.

    Raises:
        ConfigError: ranks, workers, lanes and batch don't fit each other, or the sets name different classes and the
            stage needs one list of them.
        DataError: a set is missing, damaged, or too small for the global batch.
        StorageError: a store can't be read.
    """

    def read() -> RunData:
        check_batch(
            config.global_batch,
            world_size=world_size,
            workers=config.loader_workers,
            lanes=config.lanes,
            copies=config.crops_per_image,
        )
        train = read_sources(config.sources, stage, use)
        check_data(train, config.global_batch, config.crops_per_image)
        for line in advice(
            config.global_batch, world_size=world_size, workers=config.loader_workers, lanes=config.lanes
        ):
            log.warning("%s", line)
        sets = {name: read_manifest(url) for name, url in config.evaluate.items()}
        check_evaluation_sets([source.manifest for source in train], sets, stage, use)
        takedown = Takedown() if config.takedown is None else read_takedown(config.takedown)
        if len(takedown):
            log.info("%d samples are excluded by %s", len(takedown), config.takedown)
        return RunData(config, train, sets, takedown)

    return ranks.from_first(read)


def read_sources(configs: Sequence[SourceConfig], stage: str, use: LabelUse | None) -> tuple[TrainingSource, ...]:
    """The training sets with their shares; see `read_data`.

    Raises:
        ConfigError: the sets name different classes, and the stage needs one list of them.
        DataError, StorageError: a set can't be read, or a subset is larger than its set.
    """
    manifests = [read_manifest(config.url) for config in configs]
    check_training_sets(manifests, stage, use)
    subsets = [_subset(config, manifest) for config, manifest in zip(configs, manifests, strict=True)]
    if configs[0].weight is not None:
        shares = shares_of([config.weight or 0.0 for config in configs])
    else:
        sizes = [m.num_samples if n is None else n for m, n in zip(manifests, subsets, strict=True)]
        shares = tuple(max(1, size * config.repeat) for size, config in zip(sizes, configs, strict=True))
    if len(manifests) == 1:
        shares = (1,)
    return tuple(TrainingSource(*parts) for parts in zip(manifests, shares, subsets, strict=True))


def _subset(config: SourceConfig, manifest: Manifest) -> int | None:
    """Number of samples that a source draws from its set; None for all."""
    subset, size = config.subset, manifest.num_samples
    if subset is None:
        return None
    count = max(1, round(Fraction(repr(subset)) * size)) if isinstance(subset, float) else subset
    if count > size:
        raise DataError(
            f"a subset of {count} samples of a set of {size}", where=manifest.url, fix=f"set subset to at most {size}"
        )
    return None if count == size else count


def _digest_of_many(manifest: Manifest) -> dict[str, str]:
    """A digest of all shards where there are too many to list."""
    if len(manifest.shards) <= _NAMED_SHARDS:
        return {}
    digest = hashlib.sha256()
    for shard in manifest.shards:
        digest.update(f"{shard.num_samples} {shard.sha256}\n".encode())
    return {"all_shards": digest.hexdigest()}


def same_data(before: Any, now: Any) -> bool:
    """Whether two `RunData.identity` mean the same data; early checkpoints have no digest of many shards."""
    if isinstance(before, dict) and isinstance(now, dict):
        if "sources" in before and "sources" in now:
            pairs = zip(before["sources"], now["sources"], strict=False)
            return len(before["sources"]) == len(now["sources"]) and all(same_data(*pair) for pair in pairs)
        if "all_shards" not in before:
            now = {key: value for key, value in now.items() if key != "all_shards"}
    return bool(before == now)


def describe(data: RunData) -> list[str]:
    """The training sets, for the log: a line each; none for one that is used as a whole."""
    if len(data.train) == 1 and data.train[0].subset is None:
        return []
    total = sum(source.share for source in data.train)
    lines = [
        f"{source.share / total:.2%} of the samples from {source.manifest.url}: "
        f"{source.num_samples} of its {source.manifest.num_samples}"
        for source in data.train
    ]
    if len({source.manifest.classes for source in data.train}) > 1:
        lines.append("these sets name different classes: their labels aren't read")
    return lines
