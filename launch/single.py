"""`vitrail train`: one run, on agents placed by Ray or on one in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launch import cluster
from launch.attempts import TrainResult, run_training
from launch.crew import Crew, Hire, Layout, LocalCrew, RayCrew
from launch.stopping import StopRequest
from launch.worker import has_gpu, read_document
from pipeline import config as configs
from pipeline.errors import ConfigError
from pipeline.train.config import TrainConfig


def train_one(
    config_or_run: str,
    overrides: Sequence[str],
    *,
    workers: int | None,
    nodes: int,
    cpus_per_worker: int | None,
    ray_address: str | None,
    use_ray: bool,
    stop: StopRequest,
    say: Callable[[str], None],
) -> TrainResult:
    """Run one training configuration to its end or to a stop request.

    Args:
        config_or_run: a YAML file, or a run directory to go on with.
        workers: processes on each node; None: one per GPU, or one where there is none.
        cpus_per_worker: cores for each; None: the node's, shared out equally.
        use_ray: False starts the processes from here.

    Raises:
        UserError: the configuration is wrong, or the machine or cluster can't serve it.
        JobFailedError: attempts kept dying without progress.
    """
    document = read_document(config_or_run, overrides)
    config = configs.validate(TrainConfig, document, where=config_or_run)
    hire = (
        _ray_hire(workers, nodes, cpus_per_worker, ray_address)
        if use_ray
        else _local_hire(workers, nodes, cpus_per_worker)
    )
    stop.take_signals()  # Ray put its own handlers in their place
    return run_training(
        document,
        where=config_or_run,
        run_url=config.run_url,
        hire=hire,
        stop=stop,
        on_line=lambda rank, line: say(line if rank <= 0 else f"[{rank}] {line}"),
    )


def _local_hire(workers: int | None, nodes: int, cpus_per_worker: int | None) -> Hire:
    if nodes != 1:
        raise ConfigError("several nodes need Ray", where="--nodes", fix="leave out --no-ray, or --nodes")
    if workers is None:
        workers = _num_gpus() if has_gpu() else 1
    layout = Layout(1, workers, cpus_per_worker or max(1, cluster.available_cores() // workers))

    def hire() -> Crew:
        return LocalCrew(layout)

    return hire


def _ray_hire(workers: int | None, nodes: int, cpus_per_worker: int | None, address: str | None) -> Hire:
    ray = cluster.connect(address)
    if workers is None:
        workers = max(1, ray.num_gpus // nodes)
    cores = max(1, ray.num_cpus // nodes // workers)
    layout = Layout(nodes, workers, cpus_per_worker or cores, gpus_per_worker=1 if ray.num_gpus else 0)

    def hire() -> Crew:
        return RayCrew(layout)

    return hire


def _num_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())
