"""Loader workers as processes of their own.

A worker is a fresh interpreter: nothing of the training process is forked (S3 clients and their threads would not
survive it) and its main module isn't imported again. Its first message tells it what to do; from then on it sends
parts, one ahead of what was taken. It ends when the other side of its connection closes, whatever ends that.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from pipeline.data.batch import Batch, Transform
from pipeline.data.examples import Part, Plan, produce

_TENSORS = ("ids", "seeds", "weight", "images", "text", "labels")


class WorkerDied(RuntimeError):  # noqa: N818
    """A loader's worker process ended without saying why."""


class WorkerProcess:
    """One worker, working on `plan` from its construction on.

    Args:
        plan: which samples.
        transform: must pickle, and be importable by name from a module other than `__main__`.
    """

    def __init__(self, plan: Plan, transform: Transform) -> None:
        order = pickle.dumps((plan, transform), protocol=pickle.HIGHEST_PROTOCOL)
        self._connection, theirs = Pipe()
        # The interpreter's own path, so that whatever is importable here is there.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.data.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._order = order

    def start(self) -> None:
        """Tell the process what to do; waits for it to be up."""
        try:
            self._connection.send_bytes(self._order)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Part | None:
        """The next part, waiting for it; None after the last.

        Raises:
            WorkerDied: the process ended by itself.
            Exception: whatever the work raised there.
        """
        try:
            kind, content = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._died() from error
        if kind == "error":
            raise content
        return None if kind == "end" else _unpack(content)

    def kill(self) -> None:
        """End the process, in whatever it is doing; it only reads. A `receive` under way returns."""
        self._process.kill()

    def close(self) -> None:
        """After `kill`, when no `receive` is under way any more: leave nothing behind."""
        self._process.wait()
        self._connection.close()

    def _died(self) -> WorkerDied:
        return WorkerDied(f"a loader worker ended with status {self._process.wait()}")


def main() -> None:
    """Entry of the worker process; its argument is the descriptor of its connection."""
    # Interrupts and terminations of the whole process group are the training process's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        order = connection.recv_bytes()
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        _send(connection, order)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # nobody listens any more
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # reads under way would be waited for


def _send(connection: Connection[Any, Any], order: bytes) -> None:
    try:
        plan, transform = pickle.loads(order)
        for part in produce(plan, transform, threading.Event()):
            connection.send_bytes(pickle.dumps(("part", _pack(part)), protocol=pickle.HIGHEST_PROTOCOL))
        message: tuple[str, object] = ("end", None)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        message = ("error", _portable(error))
    connection.send_bytes(pickle.dumps(message))


def _end_with(connection: Connection[Any, Any]) -> None:
    """Leave when the training process is gone: it sends nothing more, so any end of waiting means that."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(0)


def _portable(error: Exception) -> Exception:
    """The error as it can be sent, with the traceback it had here as a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        portable = pickle.loads(pickle.dumps(error))
    except Exception:
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    portable.add_note(f"in a loader worker:\n{trace}")
    return portable if isinstance(portable, Exception) else RuntimeError(trace)


def _pack(part: Part) -> dict[str, Any]:
    """A part as arrays, which pickle by copying; tensors would be passed by descriptors."""
    batch = part.batch
    arrays = {name: None if (t := getattr(batch, name)) is None else t.numpy() for name in _TENSORS}
    instances = batch.instances and tuple(
        item._replace(boxes=item.boxes.numpy(), labels=item.labels.numpy(), crowd=item.crowd.numpy())  # type: ignore[arg-type]
        for item in batch.instances
    )
    return {"arrays": arrays, "position": batch.position, "instances": instances, "faults": part.faults}


def _unpack(content: dict[str, Any]) -> Part:
    arrays: dict[str, Any] = content["arrays"]
    tensors: dict[str, Any] = {name: None if a is None else torch.from_numpy(a) for name, a in arrays.items()}
    packed: tuple[Any, ...] | None = content["instances"]
    instances = packed and tuple(
        item._replace(**{name: torch.from_numpy(getattr(item, name)) for name in ("boxes", "labels", "crowd")})
        for item in packed
    )
    return Part(Batch(position=content["position"], instances=instances, **tensors), content["faults"])


if __name__ == "__main__":
    main()
