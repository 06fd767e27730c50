"""Where an attempt begins: at the run's newest checkpoint, at `resume_from`'s, at an older one, or at the start."""

from __future__ import annotations

import logging
from typing import NamedTuple

from pipeline import ranks, storage
from pipeline.classes import check_resumed, recorded_classes
from pipeline.errors import CheckpointError, DataError
from pipeline.stages.base import Stage
from pipeline.train.checkpoints.commits import Attempt, Commit, begin_attempt
from pipeline.train.checkpoints.restore import LoadedCheckpoint, load_newest
from pipeline.train.data import same_data
from pipeline.train.engine.base import Engine
from pipeline.train.guards import RollBack
from pipeline.train.setup import RunSetup
from pipeline.train.state import Due, State

log = logging.getLogger("vitrail")


class Start(NamedTuple):
    """Where an attempt begins."""

    attempt: Attempt | None  # None: there is nothing left to train
    state: State
    origin: str  # where the weights come from, for people


class Resumption:
    """Finds where to begin, puts the engine there, and records the attempt. All methods are collective.

    Args:
        initial: where the weights come from that the engine has before anything is resumed, for people.
    """

    def __init__(self, setup: RunSetup, stage: Stage, engine: Engine, initial: str) -> None:
        self._config = setup.config
        self._checkpoints_url = setup.checkpoints_url
        self._data = setup.data
        self._stage = stage
        self._engine = engine
        self._initial = initial

    def begin(self) -> Start:
        """Resume the newest checkpoint, else `resume_from`, else begin as the engine is.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
            DataError: the data, or their classes, aren't those of the run.
        """
        while True:
            start = self._start_from(*self._newest())
            if start is not None:
                return start

    def go_back(self, back: RollBack) -> Start:
        """Resume a checkpoint from before the steps that did harm; training will skip the samples around them.

        Raises:
            DataError: there is no such checkpoint.
        """
        for at_most in back.before_steps:
            while (loaded := self._load(self._checkpoints_url, at_most)) is not None:
                start = self._start_from(loaded, _origin("checkpoint", loaded))
                if start is not None:
                    step, (first, last) = start.state.step, back.window
                    _say("rolled back to step %d; samples %d to %d of the run are skipped", step, first, last)
                    return start._replace(state=start.state.rolled_back(back.window, back.state))
        raise back.reason

    def _newest(self) -> tuple[LoadedCheckpoint | None, str]:
        """What the next attempt resumes, and how to call it."""
        loaded = self._load(self._checkpoints_url)
        if loaded is not None:
            return loaded, _origin("checkpoint", loaded)
        source = self._config.resume_from
        if source is None:
            return None, self._initial
        loaded = self._load(source)
        if loaded is None:
            raise CheckpointError("no checkpoint to resume from", where=source, fix="correct resume_from")
        return loaded, _origin("resume_from: checkpoint", loaded)

    def _load(self, url: str, at_most: int | None = None) -> LoadedCheckpoint | None:
        return load_newest(url, self._engine.wanted(), self._engine.facts(), at_most, accept=self._accept)

    def _start_from(self, loaded: LoadedCheckpoint | None, origin: str) -> Start | None:
        """Record the attempt and restore the engine; None when another job recorded that attempt's number first, and
        there may be newer checkpoints by now.
        """
        state = State() if loaded is None else State.from_document(loaded.commit.progress)
        if Due(self._config).done(state):
            return Start(None, state, origin)
        attempt = ranks.from_first(lambda: self._record_attempt(state.step))
        if attempt is None:
            return None
        if loaded is not None:
            self._engine.restore(loaded.read)
        _say("attempt %d starts from %s", attempt.number, origin)
        return Start(attempt, state, origin)

    def _record_attempt(self, resumed_step: int) -> Attempt | None:
        enforced = storage.probe_conditional_writes(self._checkpoints_url)
        if not enforced:
            log.warning(
                "%s ignores If-None-Match: two jobs that work on this run at once are told apart by waiting and "
                "listing, which is less reliable",
                self._checkpoints_url,
            )
        return begin_attempt(self._checkpoints_url, resumed_step, enforced=enforced)

    def _accept(self, commit: Commit) -> None:
        """Refuse to continue what was learned from other data, or for other classes."""
        if Due(self._config).done(State.from_document(commit.progress)):  # nothing more will be learned
            return
        info = commit.document["info"]
        check_resumed(self._stage, recorded_classes(info), where=self._data.where)
        if not same_data(info.get("data"), self._data.identity()):
            raise DataError(
                "the training set isn't the one this run began with: its order of samples can't be continued",
                where=self._data.where,
                fix="put the data back, or give the run a new name",
            )


def _origin(kind: str, loaded: LoadedCheckpoint) -> str:
    return f"{kind} at step {loaded.commit.step} of attempt {loaded.commit.attempt}"


def _say(message: str, *arguments: object) -> None:
    if ranks.world().rank == 0:
        log.info(message, *arguments)
