"""Children that never outlive the process that started them, kill -9 of it included.

On Linux the kernel does it (`PR_SET_PDEATHSIG`, prctl(2)); elsewhere `watch_parent` polls. The kernel's signal comes
when the *thread* that forked the child ends, so start such children from a thread that lives as long as they do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
# Looked up once at import: a forked child may only do the bare call.
_PRCTL = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when its parent thread ends; nothing on systems that can't.

    Fits `subprocess.Popen(preexec_fn=...)`, and survives the exec.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def watch_parent(parent: int, every_s: float = 0.5) -> None:
    """End this process with SIGKILL once `parent` is no longer its parent, wherever the kernel doesn't do it.

    Args:
        parent: process id of the starter, taken by the starter itself so that its death before this call is seen.
    """
    die_with_parent()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
