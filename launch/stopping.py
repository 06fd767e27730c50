"""Asking a driver to stop: the first SIGTERM or Ctrl-C saves and stops, the second one ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Set once someone asked for an orderly stop; shared by the threads of a driver."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def request(self) -> None:
        self._event.set()

    def requested(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Sleep up to `timeout_s`, less when a stop is asked for; whether it is."""
        return self._event.wait(timeout_s)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[StopRequest]:
        """Within the block, SIGTERM and SIGINT request the stop. Must be entered in the main thread.

        `ray.init` replaces the handlers, so call `take_signals` again after it.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.take_signals()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested():
            os._exit(1)  # children die with this process
        self._event.set()
        sys.stderr.write("stopping: saving what is there; once more ends it at once\n")
