"""Retrying calls after errors that may pass."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def retrying(
    call: Callable[[], T],
    *,
    transient: Callable[[Exception], bool],
    attempts: int = 4,
    first_wait_s: float = 0.2,
    longest_wait_s: float = 10.0,
) -> T:
    """The result of `call`, called again after errors that `transient` says may pass.

    Waits double from `first_wait_s` up to `longest_wait_s`, each multiplied by a random factor in [1/2, 1] so that
    many clients don't come back at once. The last error is raised as it is.
    """
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            if attempt == attempts - 1 or not transient(error):
                raise
            # Jitter must differ between processes that share a seed, so it comes from the system's generator.
            wait_s = min(first_wait_s * 2**attempt, longest_wait_s)
            time.sleep(wait_s * random.SystemRandom().uniform(0.5, 1.0))
    raise AssertionError("attempts must be positive")
