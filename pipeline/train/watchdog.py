"""A deadline for each phase of a run, so that a hang ends the attempt instead of using up the budget.

The start, a step, an evaluation and a save each have their own. A rank that is late (because it hangs, or waits in a
collective for one that does) dumps the stacks of all its threads and calls `on_late`, which ends the process; the
launcher then ends the other ranks and starts a new attempt.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Literal

from pipeline.train.config import WatchdogConfig

Phase = Literal["start", "step", "evaluate", "save"]
MAX_POLL_S = 5.0

log = logging.getLogger("vitrail")


class Watchdog:
    """Watches one rank from a thread of its own.

    Args:
        limits: seconds each phase may take.
        on_late: called once, with a message, in the watching thread; it needn't return.
        saving_since: when the oldest background save in progress began (`time.monotonic`), or None.
    """

    def __init__(
        self,
        limits: WatchdogConfig,
        on_late: Callable[[str], None],
        saving_since: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._limits = {
            "start": limits.start_s,
            "step": limits.step_s,
            "evaluate": limits.evaluate_s,
            "save": limits.save_s,
        }
        self._on_late = on_late
        self.saving_since = saving_since
        self._phase: tuple[Phase, float] = ("start", time.monotonic())
        self._lapse_s = 0.0  # time this process didn't run at all, since the phase began
        self._closed = threading.Event()
        self._poll_s = min(MAX_POLL_S, min(self._limits.values()) / 4)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: Phase) -> None:
        """Begin a phase, which ends the one before it. Cheap: called every step."""
        self._lapse_s = 0.0
        self._phase = (phase, time.monotonic())

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._poll_s):
            now = time.monotonic()
            if now - last > 4 * self._poll_s:  # stopped by a debugger or SIGSTOP: that doesn't count
                self._lapse_s += now - last - self._poll_s
            last = now
            message = self._late(now)
            if message is not None:
                log.critical("%s; the stacks of this rank's threads:", message)
                with contextlib.suppress(Exception):
                    sys.stderr.flush()
                    faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
                self._on_late(message)
                return

    def _late(self, now: float) -> str | None:
        phase, since = self._phase
        spent_s = now - since - self._lapse_s
        if spent_s > self._limits[phase]:
            return f"{phase} took more than its {self._limits[phase]:g} s (watchdog.{phase}_s)"
        saving_since = self.saving_since()
        if saving_since is not None and now - saving_since - self._lapse_s > self._limits["save"]:
            return f"a background save took more than its {self._limits['save']:g} s (watchdog.save_s)"
        return None
