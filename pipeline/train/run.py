"""One training run from its configuration: what `launch.worker` calls on every rank."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch

from pipeline import config as configs
from pipeline import ranks, storage
from pipeline.convert.loading import check_same_text, check_same_trunk, load_initial, reaches
from pipeline.errors import CheckpointError, DataError, UserError
from pipeline.run_dir import RunDir, command_line
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts, Stage, seeded_init
from pipeline.train.checkpoints import commits as committed
from pipeline.train.checkpoints.commits import Attempt, Commit
from pipeline.train.checkpoints.restore import (
    SavedWeights,
    load_newest,
    read_info,
    read_saved,
    read_weights,
    weights_digest,
)
from pipeline.train.checkpoints.saving import Checkpoints
from pipeline.train.classes import check_initial, check_resumed, learnt_classes, recorded_classes
from pipeline.train.config import EmaConfig, TrainConfig
from pipeline.train.data import RunData, describe, read_data, same_data
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.train.engine.deepspeed_setup import join_group
from pipeline.train.engine.ema import decay_after
from pipeline.train.guards import RollBack
from pipeline.train.loop import run_loop
from pipeline.train.measure import Measurement
from pipeline.train.meter import Meter
from pipeline.train.optim import scheduled_rate
from pipeline.train.resolve import Resolved, resolve
from pipeline.train.state import Due, State, StopSignal
from pipeline.train.track import Tracker
from pipeline.train.watchdog import Watchdog

__all__ = ["StopSignal", "TrainOutcome", "train"]

log = logging.getLogger("vitrail")


class TrainOutcome(NamedTuple):
    """How a run ended; the same on all ranks."""

    status: Literal["done", "stopped"]
    step: int
    samples: int
    weights_sha256: str  # of the consolidated weights, once done


def train(
    config: TrainConfig,
    *,
    stop: StopSignal,
    attempt_hint: str | None = None,
    on_late: Callable[[str], None] = lambda _: os._exit(1),
) -> TrainOutcome:
    """Run one training job, or go on with it where its newest valid checkpoint left it.

    Called on every rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.

    Args:
        config: the run.
        stop: this rank's wish to stop.
        attempt_hint: what the launcher calls this start; only recorded.
        on_late: ends this process when the watchdog found it hanging.

    Raises:
        UserError: configuration, data, storage or checkpoints are wrong; on all ranks alike.
    """
    watchdog = Watchdog(config.watchdog, on_late)
    try:
        return _train(config, stop, attempt_hint, watchdog)
    finally:
        watchdog.close()


def _train(config: TrainConfig, stop: StopSignal, attempt_hint: str | None, watchdog: Watchdog) -> TrainOutcome:
    join_group()
    _set_threads()
    stop.limit(config.time_limit_s)
    run = RunDir(config.run_url)
    document = config.model_dump(mode="json")
    ranks.from_first(lambda: run.check(document, complete=_complete))
    resolved = resolve(config, ranks.world(), ranks.device())
    cls = stage_class(config.stage)
    options = configs.validate(cls.options_class, config.options, where=config.name, prefix="options")
    data = read_data(config.data, ranks.world().size, config.stage, cls.label_use(options))
    for line in [*resolved.lines(), *describe(data)]:
        _say("%s", line)
    ranks.from_first(lambda: run.prepare(document, resolved.document(), command_line(), complete=_complete))
    try:
        seeded_init(config.seed)
        classes_of_sets = {name: manifest.classes for name, manifest in data.sets.items()}
        stage = cls(options, DataFacts(data.classes, data.num_samples, classes_of_sets))
        return _Run(config, run, resolved, stage, data, attempt_hint, watchdog).go(stop)
    except Exception as error:
        if ranks.world().rank == 0:
            with contextlib.suppress(Exception):
                run.write_status(state="failed", message=str(error))
        raise


class _Run:
    """The parts of a run, put together in the order they need each other."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunDir,
        resolved: Resolved,
        stage: Stage,
        data: RunData,
        attempt_hint: str | None,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.run = run
        self.resolved = resolved
        self.data = data
        self.hint = attempt_hint
        self.watchdog = watchdog
        self.is_first = ranks.world().rank == 0
        self.checkpoints_url = config.checkpoint.url or run.checkpoints_url
        self.stage = stage
        self.origin = "scratch"
        self._initialize()
        self.engine = DeepSpeedEngine(
            stage,
            config.optim,
            zero_stage=resolved.zero_stage,
            precision=resolved.precision,
            peak_lr=resolved.peak_lr,
            seed=config.seed,
            ema_decay=None if config.ema is None else partial(self._ema_decay, config.ema),
        )

    def go(self, stop: StopSignal) -> TrainOutcome:
        """Resume, train, evaluate, save; go back to an older checkpoint when the guards ask for it."""
        attempt, state = self._resume()
        status: Literal["done", "stopped"] = "done"
        while attempt is not None:
            try:
                state, status = self._attempt(attempt, state, stop)
                break
            except RollBack as back:
                attempt, state = self._go_back(back)
        self.engine.close()
        return self._end(state, status, stop.reason() if status == "stopped" else "")

    def _attempt(self, attempt: Attempt, state: State, stop: StopSignal) -> tuple[State, Literal["done", "stopped"]]:
        """Train from `state` on."""
        self.run.attempt = attempt.number
        tracker = Tracker(self.run, attempt.number, state.step, self.config.length_samples) if self.is_first else None
        self._status_at_start(attempt, state)
        checkpoints = Checkpoints(
            self.checkpoints_url,
            attempt,
            keep_last=self.config.checkpoint.keep_last,
            keep_every_samples=self.config.checkpoint.keep_every_samples,
            info=self._info(),
        )
        self.watchdog.saving_since = checkpoints.since
        micro_batch = self.resolved.micro_batch
        loader = self.data.loader(
            self.stage.transform(train=True), ranks.world(), seed=self.config.seed, micro_batch=micro_batch
        )
        try:
            outcome = run_loop(
                state,
                config=self.config,
                engine=self.engine,
                loader=loader,
                schedule=partial(self._rate),
                checkpoints=checkpoints,
                measure=Measurement(self.stage, self.engine, self.config, self.data, tracker),
                meter=Meter(tracker, self.config.data.global_batch, checkpoints),
                stop=stop,
                watch=self.watchdog.enter,
            )
        except RollBack:
            checkpoints.close()
            raise
        finally:
            loader.close()
        checkpoints.close()
        return outcome

    def _go_back(self, back: RollBack) -> tuple[Attempt | None, State]:
        """Resume an older checkpoint, from which the bad window is passed over."""
        self.watchdog.enter("start")
        for at_most in back.before_steps:
            attempt, state = self._resume(at_most)
            if attempt is not None:
                start, stop = back.window
                _say("rolled back to step %d; samples %d to %d of the run are passed over", state.step, start, stop)
                return attempt, state.rolled_back(back.window, back.state)
        raise back.reason

    def _rate(self, samples: int) -> float:
        return scheduled_rate(self.config.optim, self.resolved.peak_lr, samples, self.config.length_samples)

    def _ema_decay(self, ema: EmaConfig, samples: int) -> float:
        return decay_after(ema, samples, self.config.data.global_batch)

    def _initialize(self) -> None:
        """Take over `init_from`'s weights, unless the run has checkpoints of its own."""
        source = self.config.init_from
        if source is None or self.config.resume_from is not None:
            return
        found = ranks.from_first(lambda: committed.find_commits(self.checkpoints_url))
        if found.commits or found.skipped:
            return
        ours = self.stage.trunk.config.model_dump(mode="json")
        theirs = ranks.from_first(lambda: read_info(source))
        if reaches(self.config.init_prefixes, "trunk."):
            check_same_trunk(ours, theirs.get("trunk", {}), where=source)
        if reaches(self.config.init_prefixes, "text."):
            check_same_text(self._text_options(), theirs.get("text", {}), where=source)
        saved = ranks.from_first(lambda: _Saved(read_saved(source, self.config.init_weights)))
        weights = ranks.broadcast_tensors(saved.tensors)
        classes, prefixes = recorded_classes(theirs), self.config.init_prefixes
        check_initial(self.stage, weights, classes, prefixes, where=source)
        report = load_initial(self.stage, weights, prefixes, where=source)
        self.origin = f"init_from {source}"
        _say("%s from %s", saved.description, source)
        for line in report.lines():
            _say("%s", line)

    def _resume(self, at_most: int | None = None) -> tuple[Attempt | None, State]:
        """Apply the newest checkpoint, if there is one, and record this attempt; None for a run that is done.

        With `at_most` only checkpoints up to that step are considered; None also when there are none.
        """
        while True:
            load = partial(load_newest, wanted=self.engine.wanted(), known=self.engine.facts(), accept=self._accept)
            loaded, whose = load(self.checkpoints_url, at_most=at_most), "checkpoint"
            if loaded is None and at_most is not None:
                return None, State()
            if loaded is None and self.config.resume_from is not None:
                loaded, whose = load(self.config.resume_from), "resume_from: checkpoint"
                if loaded is None:
                    raise CheckpointError(
                        "no checkpoint to resume from", where=self.config.resume_from, fix="mend resume_from"
                    )
            state = State() if loaded is None else State.from_document(loaded[0].progress)
            if Due(self.config).done(state):
                return None, state
            attempt = ranks.from_first(partial(self._begin, state.step))
            if attempt is not None:
                break
        if loaded is not None:
            commit, read = loaded
            self.engine.restore(read)
            self.origin = f"{whose} at step {commit.step} of attempt {commit.attempt}"
        _say("attempt %d starts from %s", attempt.number, self.origin)
        return attempt, state

    def _begin(self, resumed_step: int) -> Attempt | None:
        enforced = storage.probe_conditional_writes(self.checkpoints_url)
        if not enforced:
            log.warning(
                "%s ignores If-None-Match: two jobs working on this run at once are told apart by waiting and listing, "
                "which is weaker",
                self.checkpoints_url,
            )
        return committed.begin_attempt(self.checkpoints_url, resumed_step, enforced=enforced)

    def _accept(self, commit: Commit) -> None:
        """Refuse to go on from what was learnt from other data, or for other classes."""
        if Due(self.config).done(State.from_document(commit.progress)):  # nothing will be learnt any more
            return
        info = commit.document["info"]
        check_resumed(self.stage, recorded_classes(info), where=self.data.where)
        if not same_data(info.get("data"), self._info()["data"]):
            raise DataError(
                "the training set isn't the one this run began with: its order of samples can't be continued",
                where=self.data.where,
                fix="put the data back, or give the run a new name",
            )

    def _info(self) -> dict[str, object]:
        config = self.config.model_dump(mode="json")
        return {
            "stage": self.config.stage,
            "name": self.config.name,
            "options": config["options"],
            "train": config["data"]["train"],
            "classes": list(learnt_classes(self.stage)),
            "trunk": self.stage.trunk.config.model_dump(mode="json"),
            "text": self._text_options(),
            "zero_stage": self.resolved.zero_stage,
            "precision": self.resolved.precision,
            "ema": None if self.config.ema is None else self.config.ema.model_dump(mode="json"),
            "data": self.data.identity(),
        }

    def _text_options(self) -> dict[str, object]:
        """Of a stage with a text tower; {} for others."""
        text = self.stage.text_options
        return {} if text is None else dict(text.model_dump(mode="json"))

    def _status_at_start(self, attempt: Attempt, state: State) -> None:
        if not self.is_first:
            return
        begun = self.run.status().get("started", time.time())
        self.run.write_status(
            state="running",
            stage=self.config.stage,
            step=state.step,
            samples=state.samples,
            length_samples=self.config.length_samples,
            attempt=attempt.number,
            attempt_hint=self.hint,
            started=begun,
            resumed_from=self.origin,
            checkpoints=self.checkpoints_url,
            message="",
            world_size=self.resolved.world_size,
            zero_stage=self.resolved.zero_stage,
            precision=self.resolved.precision,
            num_parameters=sum(
                int(torch.Size(f.shape).numel()) for f in self.engine.facts().values() if f.kind != "buffer"
            ),
        )

    def _end(self, state: State, status: Literal["done", "stopped"], message: str) -> TrainOutcome:
        """Read the weights back from the last checkpoint, which shows that it is whole, and tell their hash."""

        def conclude() -> str:
            digest = weights_digest(read_weights(self.checkpoints_url, "raw")) if status == "done" else ""
            self.run.write_status(
                state=status,
                message=message,
                step=state.step,
                samples=state.samples,
                weights_sha256=digest,
                num_skipped=state.num_skipped,
                num_rollbacks=state.num_rollbacks,
            )
            return digest

        digest = ranks.from_first(conclude)
        _say("%s at step %d, %d samples", status, state.step, state.samples)
        return TrainOutcome(status, state.step, state.samples, digest)


class _Saved:
    """Carries tensors past `from_first`'s broadcast, which is for small objects: only the reader keeps them."""

    def __init__(self, saved: SavedWeights) -> None:
        self.tensors = saved.tensors
        self.description = saved.describe()

    def __reduce__(self) -> tuple[object, ...]:
        return (_Saved, (SavedWeights({}, "raw", "", 0, {}),), {"tensors": {}, "description": self.description})


def _complete(document: configs.Document) -> configs.Document:
    """An earlier attempt's configuration, with the defaults of keys that didn't exist then."""
    try:
        return configs.validate(TrainConfig, document, where="config.yaml").model_dump(mode="json")
    except UserError:
        return document


def _set_threads() -> None:
    """Share the cores among the ranks of this node, unless OMP_NUM_THREADS says otherwise: results depend on it."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        torch.set_num_threads(max(1, cores // ranks.local_size()))


def _say(message: str, *arguments: object) -> None:
    if ranks.world().rank == 0:
        log.info(message, *arguments)
