"""`vitrail train`: one run, by ranks that Ray places or that are started from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from launch.stopping import StopRequest
from launch.worker import read_document
from launch.workers.attempts import TrainResult, run_training
from launch.workers.group import Allocate, LocalWorkerGroup, WorkerGroup, allocator
from launch.workers.placement import PlacementRequest, RankPlacement, placement_for
from pipeline import config as configs
from pipeline import ray_cluster
from pipeline.errors import ConfigError
from pipeline.machine import this_machine
from pipeline.train.config import TrainConfig


class Where(NamedTuple):
    """On what a run is started."""

    request: PlacementRequest = PlacementRequest()
    ray_address: str | None = None  # of an existing Ray; None: RAY_ADDRESS, else embedded
    use_ray: bool = True  # False: the ranks are children of this process
    excluded: Sequence[str] = ()  # machines not to use, by Ray's id (or its beginning) or address


def train_one(
    config_or_run: str, overrides: Sequence[str], where: Where, *, stop: StopRequest, say: Callable[[str], None]
) -> TrainResult:
    """Run one training configuration to its end or to a stop request.

    Args:
        config_or_run: a YAML file, or a run directory to go on with.

    Raises:
        UserError: the configuration is wrong, or the machine or cluster can't serve it.
        JobFailedError: attempts kept dying without progress.
    """
    return train_document(read_document(config_or_run, overrides), config_or_run, where, stop=stop, say=say)


def train_document(
    document: configs.Document, name: str, where: Where, *, stop: StopRequest, say: Callable[[str], None]
) -> TrainResult:
    """As `train_one`, of a configuration that was read already; messages call it `name`."""
    config = configs.validate(TrainConfig, document, where=name)
    batch = config.data.global_batch
    allocate = _on_ray(where, batch) if where.use_ray else _on_this_machine(where.request, batch)
    stop.take_signals()  # Ray put its own handlers in their place
    return run_training(
        document,
        where=name,
        run_url=config.run_url,
        allocate=allocate,
        stop=stop,
        on_line=lambda rank, line: say(line if rank <= 0 else f"[{rank}] {line}"),
        max_fruitless=config.max_fruitless_attempts,
    )


def _on_this_machine(request: PlacementRequest, global_batch: int) -> Allocate:
    if isinstance(request.ranks, tuple):
        raise ConfigError("an elastic job needs Ray", where="--ranks", fix="leave out --no-ray, or give one number")
    if request.machines != 1:
        raise ConfigError("several machines need Ray", where="--machines", fix="leave out --no-ray, or --machines")
    placement = placement_for(request, [this_machine()], global_batch)
    assert isinstance(placement, RankPlacement)

    def allocate(excluded: Sequence[str]) -> WorkerGroup:
        return LocalWorkerGroup(placement)

    return allocate


def _on_ray(where: Where, global_batch: int) -> Allocate:
    if isinstance(where.request.ranks, tuple) and where.request.machines != 1:
        raise ConfigError("an elastic job takes the machines there are", where="--ranks", fix="leave out --machines")
    ray_cluster.connect(where.ray_address)
    return allocator(where.request, global_batch, excluded=where.excluded)
