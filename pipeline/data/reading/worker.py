"""Loader workers as processes of their own.

A worker is a fresh interpreter: nothing of the training process is forked (S3 clients and their threads would not
survive it) and its main module isn't imported again. Its first message tells it how to make parts, each further one
brings a task. It answers with parts in the tasks' order, one ahead of what was taken: a header, then the bytes of each
array, which are received where they are wanted and copied by nobody else. It ends when the other side of its
connection closes, whatever ends that.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Instances
from pipeline.data.order.tasks import Task
from pipeline.data.reading.examples import BatchPart, Fault, WorkerSetup, produce

Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""(name of the field, shape of the worker's part, type) -> where to put it."""


class WorkerDied(RuntimeError):  # noqa: N818
    """A loader's worker process ended without saying why."""


class Received(NamedTuple):
    """A part whose arrays were put where the receiver wanted them."""

    fields: dict[str, Tensor]
    position: int
    instances: tuple[Instances, ...] | None
    faults: tuple[Fault, ...]
    num_withdrawn: int


class WorkerProcess:
    """One worker; it starts up from its construction on.

    Args:
        setup: must pickle; its transform must be importable by name from a module other than `__main__`.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup: bytes | None = pickle.dumps(setup, protocol=pickle.HIGHEST_PROTOCOL)
        self._connection, theirs = Pipe()
        # The interpreter's own path, so that whatever is importable here is there.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.data.reading.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, task: Task | None) -> None:
        """Send a task, or None when there are no more. The first call waits for the process to be up.

        Sending to a process that has ended does nothing; `receive` raises why it ended, which it left in the pipe.
        """
        with contextlib.suppress(OSError):
            if self._setup is not None:
                self._connection.send_bytes(self._setup)
                self._setup = None
            self._connection.send_bytes(pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL))

    def receive(self, allocate: Allocate) -> Received | None:
        """The next part, waiting for it; None after the last.

        Raises:
            WorkerDied: the process ended by itself.
            Exception: whatever the work raised there.
        """
        try:
            kind, content = pickle.loads(self._connection.recv_bytes())
            if kind == "error":
                raise content
            if kind == "end":
                return None
            fields = {}
            for name, shape, dtype in content["arrays"]:
                fields[name] = allocate(name, shape, torch.from_numpy(np.empty(0, dtype)).dtype)
                if fields[name].numel():
                    self._connection.recv_bytes_into(_bytes(fields[name].numpy()))
        except (EOFError, OSError) as error:
            raise self._died() from error
        return Received(
            fields, content["position"], _tensors(content["instances"]), content["faults"], content["num_withdrawn"]
        )

    def kill(self) -> None:
        """End the process, in whatever it is doing; it only reads. A `receive` under way returns."""
        self._process.kill()

    def close(self) -> None:
        """After `kill`, when no `receive` is under way any more: leave nothing behind."""
        self._process.wait()
        self._connection.close()

    def _died(self) -> WorkerDied:
        return WorkerDied(f"a loader worker ended with status {self._process.wait()}")


class _Inbox:
    """Tasks as they come in, received by a thread that also notices when the training process is gone."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._ended = False
        threading.Thread(target=self._receive, daemon=True).start()

    def get(self, *, wait: bool) -> Task | None:
        if self._ended:
            return None
        try:
            task = self._tasks.get(block=wait)
        except queue.Empty:
            return None
        self._ended = task is None
        return task

    def _receive(self) -> None:
        try:
            while True:
                self._tasks.put(pickle.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)  # the training process is gone; a normal exit would wait for reads under way


def main() -> None:
    """Entry of the worker process; its argument is the descriptor of its connection."""
    # Interrupts and terminations of the whole process group are the training process's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the training process is gone
        _send(connection, connection.recv_bytes())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # reads under way would be waited for


def _send(connection: Connection[Any, Any], pickled_setup: bytes) -> None:
    try:
        setup: WorkerSetup = pickle.loads(pickled_setup)
        for part in produce(_Inbox(connection), setup, threading.Event()):
            header, arrays = _pack(part)
            connection.send_bytes(pickle.dumps(("part", header), protocol=pickle.HIGHEST_PROTOCOL))
            for array in arrays:
                if array.size:
                    connection.send_bytes(_bytes(array))
        message: tuple[str, object] = ("end", None)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        message = ("error", _portable(error))
    connection.send_bytes(pickle.dumps(message))


def _bytes(array: np.ndarray) -> memoryview:
    """The array's memory."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # an ndarray is a buffer


def _portable(error: Exception) -> Exception:
    """The error as it can be sent, with the traceback it had here as a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        portable = pickle.loads(pickle.dumps(error))
    except Exception:
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    portable.add_note(f"in a loader worker:\n{trace}")
    return portable if isinstance(portable, Exception) else RuntimeError(trace)


def _pack(part: BatchPart) -> tuple[dict[str, Any], list[np.ndarray]]:
    """A part as a small header and its arrays."""
    batch = part.batch
    present = [(name, tensor.contiguous().numpy()) for name, tensor in batch.tensors().items()]
    instances = batch.instances and tuple(
        item._replace(**{name: getattr(item, name).numpy() for name in _present(item)}) for item in batch.instances
    )
    header = {
        "arrays": [(name, array.shape, array.dtype.str) for name, array in present],
        "position": batch.position,
        "instances": instances,
        "faults": part.faults,
        "num_withdrawn": part.num_withdrawn,
    }
    return header, [array for _, array in present]


def _tensors(packed: tuple[Any, ...] | None) -> tuple[Instances, ...] | None:
    return packed and tuple(
        item._replace(**{name: torch.from_numpy(getattr(item, name)) for name in _present(item)}) for item in packed
    )


def _present(item: Instances) -> list[str]:
    """The fields of an image's objects that hold tensors."""
    return [name for name in ("boxes", "labels", "crowd", "areas") if getattr(item, name) is not None]


if __name__ == "__main__":
    main()
