"""What a person watching a chain sees: a live line for each running step on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from launch.progress import StepProgress

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY_S = 10.0  # of plain progress, for each step


class Display(Protocol):
    """Takes what happens, from any thread."""

    def line(self, text: str) -> None:
        """Something worth keeping on the screen and in a log."""

    def progress(self, name: str, progress: StepProgress) -> None:
        """How far a running step is."""

    def end(self, name: str) -> None:
        """The step runs no more."""


class PlainDisplay:
    """Lines on stderr; a step's progress when it has changed, at most every `every_s` seconds."""

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        self._every_s = every_s
        self._lock = threading.Lock()
        self._shown: dict[str, tuple[float, str]] = {}  # when, and what

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, name: str, progress: StepProgress) -> None:
        now = time.monotonic()
        with self._lock:
            at, text = self._shown.setdefault(name, (now, progress.text))
            if not progress.text or progress.text == text or now - at < self._every_s:
                return
            self._shown[name] = now, progress.text
        self.line(f"{name}: {progress.text}")

    def end(self, name: str) -> None:
        with self._lock:
            self._shown.pop(name, None)


class LiveDisplay:
    """A bar for each running step below the lines, with the time it took and may still take."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def line(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, name: str, progress: StepProgress) -> None:
        with self._lock:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=None, detail="")
            task = self._tasks[name]
        self._bars.update(task, completed=progress.done, total=progress.total or None, detail=progress.text)

    def end(self, name: str) -> None:
        with self._lock:
            task = self._tasks.pop(name, None)
        if task is not None:
            self._bars.remove_task(task)

    def __enter__(self) -> LiveDisplay:
        self._bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bars.stop()


def shows_live() -> bool:
    """Whether stderr is a terminal that can redraw lines, and nobody asked for plain output (NO_COLOR, CI)."""
    plain = os.environ.get("TERM", "dumb") == "dumb" or "NO_COLOR" in os.environ or "CI" in os.environ
    return sys.stderr.isatty() and not plain


@contextmanager
def open_display() -> Iterator[Display]:
    """The display that fits stderr."""
    if not shows_live():
        yield PlainDisplay()
        return
    with LiveDisplay() as display:
        yield display
