"""Saving checkpoints while training continues.

A save copies this rank's fragments to host memory; only the next step waits for that. A thread writes them, and that of
rank 0 commits once every rank's receipt is there. The threads use no collectives, so they can't disturb training's.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pipeline import ranks, storage
from pipeline.errors import CheckpointError, StorageError
from pipeline.train.checkpoints import fragments as fmt
from pipeline.train.checkpoints.commits import Attempt, Commit, read_attempts, retire, write_commit
from pipeline.train.engine.base import Fragment, Span, TensorFacts

T = TypeVar("T")
NUM_BUFFERS = 2  # saves in progress at most
ATTEMPTS_PER_WRITE = 5
COMMIT_DEADLINE_S = 900.0  # for the receipts of all ranks
DRAIN_POLL_S = 0.05

log = logging.getLogger("vitrail")


class Save(NamedTuple):
    """One checkpoint to be written."""

    step: int
    fragments: list[Fragment]
    facts: Mapping[str, TensorFacts]
    progress: Mapping[str, Any]
    copied: threading.Event


class CheckpointWriter:
    """Writes an attempt's checkpoints in the background.

    Args:
        url: the checkpoints folder.
        attempt: this start of the run.
        keep_last: how many of the newest checkpoints are kept.
        keep_every_samples: one more is kept per so many samples.
        info: what every commit says about the run.
    """

    def __init__(
        self,
        url: str,
        attempt: Attempt,
        *,
        keep_last: int,
        keep_every_samples: int | None,
        info: Mapping[str, Any],
    ) -> None:
        self.url = url
        self.attempt = attempt
        self.num_failed = 0
        self.num_skipped = 0
        self.superseded = False  # by a later attempt, which makes this one's commits void
        self._keep = (keep_last, keep_every_samples)
        self._known: dict[str, Commit] = {}  # commits read so far, by path
        self._info = dict(info)
        self._world = ranks.world()
        self._pending: queue.Queue[Save | None] = queue.Queue()
        self._free: queue.Queue[Tensor] = queue.Queue()
        for _ in range(NUM_BUFFERS):
            self._free.put(torch.empty(0, dtype=torch.uint8))
        self._copying: threading.Event | None = None
        self._last_failure = ""
        self._failed_step = -1  # of the newest save that failed here
        self._given_up_step = -1  # of the newest save that failed on some rank: its parts will never be complete
        self._begun: dict[int, float] = {}  # when the saves in progress began, by step
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def save(
        self, step: int, fragments: Sequence[Fragment], facts: Mapping[str, TensorFacts], progress: Mapping[str, Any]
    ) -> bool:
        """Begin to save; False if this save was skipped because some rank still writes two earlier ones. Collective.

        A failure never ends the run; it is counted in `num_failed` later.

        Args:
            step: number of steps done.
            fragments: this rank's share, as views that stay valid until `wait_copied` returns.
            facts: of all tensors.
            progress: the loop's state.
        """
        if self._exchange() >= NUM_BUFFERS:
            self.num_skipped += 1
            log.warning("checkpoint at step %d skipped: writing is %d saves behind", step, NUM_BUFFERS)
            return False
        self._copying = threading.Event()
        self._begun[step] = time.monotonic()
        self._pending.put(Save(step, list(fragments), dict(facts), dict(progress), self._copying))
        return True

    def wait_copied(self) -> None:
        """Wait until the state may change again; called at the start of every step."""
        if self._copying is not None:
            self._copying.wait()
            self._copying = None

    def finish(
        self, step: int, fragments: Sequence[Fragment], facts: Mapping[str, TensorFacts], progress: Mapping[str, Any]
    ) -> None:
        """Save once more, and wait until everything is written. Collective; arguments as for `save`.

        Raises:
            StorageError: this last save failed on some rank.
            CheckpointError: a later attempt has taken the run over.
        """
        self._drain()
        self.save(step, fragments, facts, progress)
        self._drain()
        failures = [text for text in ranks.gather(self._last_failure) if text]
        if failures:
            raise StorageError(
                f"the last checkpoint couldn't be saved ({failures[0]})",
                where=self.url,
                fix="repair the storage and run the same command again: it resumes from the newest checkpoint",
            )

    def _drain(self) -> None:
        """Wait until every rank has written everything; raises CheckpointError in an attempt that is superseded."""
        self.wait_copied()
        while self._exchange():
            time.sleep(DRAIN_POLL_S)
        if ranks.broadcast(self.superseded):
            raise CheckpointError(
                "a later attempt has taken over this run", where=self.url, fix="let that attempt continue"
            )

    def _exchange(self) -> int:
        """Saves in progress on the rank with the most; every rank learns of failures on others. Collective."""
        answers = ranks.gather((self._pending.unfinished_tasks, self._failed_step))
        self._given_up_step = max(step for _, step in answers)
        return max(num_saves for num_saves, _ in answers)

    def since(self) -> float | None:
        """When the oldest save in progress began (`time.monotonic`); None when there is none."""
        return min(list(self._begun.values()), default=None)

    def close(self) -> None:
        """End the thread once it has written everything."""
        self._pending.put(None)
        self._thread.join(timeout=COMMIT_DEADLINE_S)

    def _work(self) -> None:
        while True:
            save = self._pending.get()
            try:
                if save is None:
                    return
                self._write(save)
                self._last_failure = ""
            except Exception as error:
                self._last_failure = str(error) or repr(error)
                self.num_failed += 1
                if save is not None:
                    self._failed_step = save.step
                    log.warning("checkpoint at step %d failed, training continues: %s", save.step, error)
            finally:
                if save is not None:
                    save.copied.set()
                    self._begun.pop(save.step, None)
                self._pending.task_done()

    def _write(self, save: Save) -> None:
        folder = storage.join(self.url, f"step-{save.step:012d}", self.attempt.folder)
        stem = f"rank-{self._world.rank:05d}"
        layout = fmt.lay_out(save.fragments)
        labels = [(Span(f.name, f.start, f.stop), f.group) for f in save.fragments]
        buffer = self._free.get()
        try:
            if buffer.numel() < layout.size_bytes:
                buffer = torch.empty(layout.size_bytes, dtype=torch.uint8, pin_memory=ranks.device().type == "cuda")
            fmt.copy_to_host(save.fragments, layout, buffer)
            save.fragments.clear()
            save.copied.set()
            data = memoryview(buffer.numpy().data)[: layout.size_bytes]
            names = (f"{stem}.safetensors", f"{stem}.table.json")
            table = fmt.table_of(labels, layout, data, names[0])
            receipt = fmt.receipt_of({names[0]: data, names[1]: table})
            _retried(lambda: storage.write(storage.join(folder, names[0]), data))
            _retried(lambda: storage.write(storage.join(folder, names[1]), table))
            _retried(lambda: storage.write(storage.join(folder, f"{stem}.receipt.json"), receipt))
        finally:
            self._free.put(buffer)
        if self._world.rank == 0:
            self._commit(folder, save)

    def _commit(self, folder: str, save: Save) -> None:
        files = self._receipts(folder, save.step)
        later = [a for a in _retried(lambda: read_attempts(self.url)) if a.number > self.attempt.number]
        if later:
            self.superseded = True
            return
        document = {
            "step": save.step,
            "attempt": self.attempt.number,
            "world_size": self._world.size,
            "time": time.time(),
            "progress": save.progress,
            "info": self._info,
            "tensors": {name: facts._asdict() for name, facts in save.facts.items()},
            "files": files,
        }
        _retried(lambda: write_commit(folder, document))
        try:
            retire(self.url, self.attempt, *self._keep, self._known)
        except (OSError, StorageError) as error:
            log.warning("old checkpoints couldn't be removed: %s", error)

    def _receipts(self, folder: str, step: int) -> list[dict[str, Any]]:
        """The files of all ranks, once each rank has written its receipt."""
        files: list[dict[str, Any]] = []
        deadline = time.monotonic() + COMMIT_DEADLINE_S
        for rank in range(self._world.size):
            path = storage.join(folder, f"rank-{rank:05d}.receipt.json")
            wait_s = 0.01
            while True:
                try:
                    files += json.loads(_retried(lambda path=path: storage.read(path)))["files"]  # type: ignore[misc]
                    break
                except FileNotFoundError:
                    if step <= self._given_up_step:
                        raise StorageError(
                            "another rank couldn't write its part", where=folder, fix="look into that rank's log"
                        ) from None
                    if time.monotonic() > deadline:
                        raise TimeoutError(
                            f"rank {rank} hasn't written its part in {COMMIT_DEADLINE_S:.0f} s"
                        ) from None
                    time.sleep(wait_s)
                    wait_s = min(2 * wait_s, 1.0)
        return files


def _retried(call: Callable[[], T]) -> T:
    """The result of `call`, which is repeated after growing pauses while the storage fails."""
    for attempt in range(ATTEMPTS_PER_WRITE):
        try:
            return call()
        except FileNotFoundError:
            raise
        except (OSError, StorageError):
            if attempt == ATTEMPTS_PER_WRITE - 1:
                raise
            time.sleep(0.5 * 2**attempt)
    raise AssertionError
