"""Metric lines, TensorBoard scalars and progress in the log while a run trains. Rank 0 only."""

from __future__ import annotations

import io
import logging
import math
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.run_dir import RunDir

PROGRESS_S = 5.0  # between progress lines in the log
STATUS_REMOTE_S = 30.0  # between updates of status.json where each is a request

log = logging.getLogger("vitrail")


class Tracker:
    """Writes the metrics and progress of one attempt.

    Args:
        run: the run directory.
        attempt: its number.
        resumed_step: where it began; metrics of earlier attempts beyond that step are void.
        length_samples: of the whole run, for the time that is left.
    """

    def __init__(self, run: RunDir, attempt: int, resumed_step: int, length_samples: int) -> None:
        self._run = run
        self._attempt = attempt
        self._length = length_samples
        self._board = _Board(run, attempt, resumed_step)
        self._progress_at = -math.inf
        self._status_at = -math.inf
        self._rates: list[float] = []
        run.append_metrics(
            [
                {
                    "kind": "attempt",
                    "attempt": attempt,
                    "step": resumed_step,
                    "resumed_step": resumed_step,
                    "time": time.time(),
                }
            ]
        )

    def step(self, step: int, samples: int, values: Mapping[str, Any]) -> None:
        """One training step's values: numbers, or lists by rank."""
        line = {"kind": "train", "attempt": self._attempt, "step": step, "samples": samples, "time": time.time()}
        self._run.append_metrics([{**line, **values}])
        self._board.add(step, {f"train/{key}": value for key, value in values.items()})
        self._rates = [*self._rates[-19:], float(values.get("samples_per_s", 0.0))]
        now = time.monotonic()
        if now - self._progress_at >= PROGRESS_S or samples >= self._length:
            self._progress_at = now
            self._show(step, samples, values)
            if now - self._status_at >= (STATUS_REMOTE_S if storage.is_remote(self._run.url) else PROGRESS_S):
                self._status_at = now
                self._run.write_status(step=step, samples=samples, attempt=self._attempt)

    def evaluated(
        self, step: int, samples: int, figures: Mapping[str, float], details: Mapping[str, Any], *, weights: str
    ) -> None:
        """Figures of an evaluation of the "raw" or "ema" weights; figures named *_raw are always of the raw ones."""
        self._run.write_evaluation(step, figures, {**details, "weights": weights})
        line = {"kind": "evaluate", "attempt": self._attempt, "step": step, "samples": samples, "time": time.time()}
        self._run.append_metrics([{**line, "weights": weights, "figures": dict(figures)}])
        self._board.add(step, figures)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        kind = " (moving average of the weights)" if weights == "ema" else ""
        log.info("step %d%s: %s", step, kind, shown or "nothing to evaluate")

    def pictures(self, step: int, pictures: Sequence[tuple[str, Sequence[tuple[str, bytes]]]]) -> None:
        """Pictures for the report, panels as PNG."""
        if pictures:
            self._run.write_pictures(step, pictures)

    def flush(self) -> None:
        """Make everything written so far durable; called before a checkpoint, which makes its steps final."""
        self._run.flush_metrics()
        self._board.flush()

    def _show(self, step: int, samples: int, values: Mapping[str, Any]) -> None:
        rates = sorted(rate for rate in self._rates if rate > 0)
        rate = rates[len(rates) // 2] if rates else 0.0
        left = _duration((self._length - samples) / rate) if rate else "?"
        log.info(
            "step %d, %d of %d samples (%d%%), loss %.4g, lr %.3g, %.0f samples/s, %s left",
            step,
            samples,
            self._length,
            100 * samples // self._length,
            values.get("loss", math.nan),
            values.get("lr", math.nan),
            rate,
            left,
        )


class _Board:
    """TensorBoard's event file, written without TensorBoard's own writer, whose import takes seconds."""

    def __init__(self, run: RunDir, attempt: int, resumed_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{attempt:06d}"
        self._url = run.at("tensorboard", name)
        self._file: Any
        if storage.is_remote(self._url):
            self._file = io.BytesIO()
        else:
            path = Path(self._url)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # voids what came before at later steps
        self._write(event_pb2.Event(wall_time=time.time(), step=resumed_step + 1, session_log=start))
        self._sent = 0

    def add(self, step: int, scalars: Mapping[str, Any]) -> None:
        values = [
            self._summary.Summary.Value(tag=tag, simple_value=float(value))
            for tag, value in scalars.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        if values:
            self._write(
                self._event.Event(wall_time=time.time(), step=step, summary=self._summary.Summary(value=values))
            )

    def flush(self) -> None:
        if not isinstance(self._file, io.BytesIO):
            self._file.flush()
        elif self._file.tell() > self._sent:
            self._sent = self._file.tell()
            storage.write(self._url, self._file.getvalue())

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
