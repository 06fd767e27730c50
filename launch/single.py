"""`vitrail train`: one run, on agents placed by Ray or on one in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launch import cluster
from launch.attempts import TrainResult, run_training
from launch.crew import Crew, Hire, LocalCrew, RayCrew
from launch.layout import Elastic, Layout, parse_workers
from launch.stopping import StopRequest
from launch.worker import has_gpu, read_document
from pipeline import config as configs
from pipeline.errors import ConfigError
from pipeline.train.config import TrainConfig


def train_one(
    config_or_run: str,
    overrides: Sequence[str],
    *,
    workers: str | None,
    nodes: int,
    cpus_per_worker: int | None,
    ray_address: str | None,
    use_ray: bool,
    excluded: Sequence[str] = (),
    stop: StopRequest,
    say: Callable[[str], None],
) -> TrainResult:
    """Run one training configuration to its end or to a stop request.

    Args:
        config_or_run: a YAML file, or a run directory to go on with.
        workers: processes on each node; "MIN:MAX": over all nodes, as many as fit, growing and shrinking with the
            cluster; None: one per GPU, or one where there is none.
        cpus_per_worker: cores for each; None: the node's, shared out equally.
        use_ray: False starts the processes from here.
        excluded: nodes not to use, by Ray's id (or its beginning) or address.

    Raises:
        UserError: the configuration is wrong, or the machine or cluster can't serve it.
        JobFailedError: attempts kept dying without progress.
    """
    document = read_document(config_or_run, overrides)
    config = configs.validate(TrainConfig, document, where=config_or_run)
    count = parse_workers(workers) if workers is not None else None
    if isinstance(count, tuple):
        if not use_ray or nodes != 1:
            raise ConfigError(
                "an elastic job takes the nodes there are", where="--workers", fix="leave out --nodes and --no-ray"
            )
        hire = _elastic_hire(count, config.data.global_batch, cpus_per_worker, ray_address, excluded)
    elif use_ray:
        hire = _ray_hire(count, nodes, cpus_per_worker, ray_address, excluded)
    else:
        hire = _local_hire(count, nodes, cpus_per_worker)
    stop.take_signals()  # Ray put its own handlers in their place
    return run_training(
        document,
        where=config_or_run,
        run_url=config.run_url,
        hire=hire,
        stop=stop,
        on_line=lambda rank, line: say(line if rank <= 0 else f"[{rank}] {line}"),
        max_fruitless=config.max_fruitless_attempts,
    )


def _local_hire(workers: int | None, nodes: int, cpus_per_worker: int | None) -> Hire:
    if nodes != 1:
        raise ConfigError("several nodes need Ray", where="--nodes", fix="leave out --no-ray, or --nodes")
    if workers is None:
        workers = _num_gpus() if has_gpu() else 1
    layout = Layout(1, workers, cpus_per_worker or max(1, cluster.available_cores() // workers))

    def hire(excluded: Sequence[str]) -> Crew:
        return LocalCrew(layout)

    return hire


def _elastic_hire(
    workers: tuple[int, int],
    global_batch: int,
    cpus_per_worker: int | None,
    address: str | None,
    excluded: Sequence[str],
) -> Hire:
    ray = cluster.connect(address)
    wanted = Elastic(*workers, global_batch, cpus_per_worker or 1, gpus_per_worker=1 if ray.num_gpus else 0)

    def hire(also_excluded: Sequence[str]) -> Crew:
        return RayCrew(wanted, excluded=[*excluded, *also_excluded])

    return hire


def _ray_hire(
    workers: int | None, nodes: int, cpus_per_worker: int | None, address: str | None, excluded: Sequence[str]
) -> Hire:
    ray = cluster.connect(address)
    if workers is None:
        workers = max(1, ray.num_gpus // nodes)
    cores = max(1, ray.num_cpus // nodes // workers)
    layout = Layout(nodes, workers, cpus_per_worker or cores, gpus_per_worker=1 if ray.num_gpus else 0)

    def hire(also_excluded: Sequence[str]) -> Crew:
        return RayCrew(layout, excluded=[*excluded, *also_excluded])

    return hire


def _num_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())
