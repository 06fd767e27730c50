"""What the tests of whole runs do on every rank of a process group."""

from __future__ import annotations

from typing import Any

from pipeline import config as configs
from pipeline import ranks
from pipeline.errors import UserError
from pipeline.run_dir import RunDir
from pipeline.stages import stage_class
from pipeline.train.checkpoints.commits import find_commits
from pipeline.train.checkpoints.restore import weights_digest
from pipeline.train.config import TrainConfig
from pipeline.train.run import StopSignal, train


class StopAfter(StopSignal):
    """Asks to stop, on one rank alone, once the run has logged a step."""

    def __init__(self, run: RunDir, step: int, rank: int = 0) -> None:
        super().__init__()
        self._run, self._step, self._rank = run, step, rank

    def requested(self) -> bool:
        lines = self._run.metrics() if ranks.world().rank == self._rank else []
        return bool(lines) and lines[-1]["step"] >= self._step - 1


def run(document: dict[str, Any], stop_after: int | None = None, stop_rank: int = 0) -> Any:
    """The run's outcome as a tuple, or the user error's class, message and fix."""
    config = configs.validate(TrainConfig, document, where="test")
    directory = RunDir(config.run_url)
    stop = StopSignal() if stop_after is None else StopAfter(directory, stop_after, stop_rank)
    try:
        return tuple(train(config, stop=stop))
    except UserError as error:
        return type(error).__name__, f"{error.where}: {error.what}", error.fix


def run_with_bad_samples(document: dict[str, Any], bad: tuple[int, int], stop_after: int | None = None) -> Any:
    """`run`, where the loss of the rank that holds a sample of the training position range is NaN."""
    cls = stage_class(document["stage"])
    plain = cls.loss

    def loss(self: Any, batch: Any) -> Any:
        losses = plain(self, batch)
        spoilt = bad[0] <= batch.position < bad[1] and ranks.world().rank == ranks.world().size - 1
        return losses._replace(total=losses.total * float("nan")) if spoilt else losses

    cls.loss = loss  # type: ignore[method-assign]
    try:
        return run(document, stop_after)
    finally:
        cls.loss = plain  # type: ignore[method-assign]


def run_until(document: dict[str, Any], step: int) -> Any:
    """`run`, stopped after so many steps of this call (without looking at the run directory)."""
    config = configs.validate(TrainConfig, document, where="test")
    return tuple(train(config, stop=_StopAtCall(step)))


class _StopAtCall(StopSignal):
    """Asks to stop at the n-th time it is asked: once a step."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self._left = calls

    def requested(self) -> bool:
        self._left -= 1
        return self._left <= 0


def digest(weights: Any) -> str:
    return weights_digest(weights)


def committed_steps(url: str) -> list[int]:
    return [commit.step for commit in find_commits(url).commits]
