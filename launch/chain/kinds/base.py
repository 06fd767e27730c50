"""What a chain has to know of a kind of step: where it writes, what it needs, and how it runs."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any, NamedTuple

from launch.stopping import StopRequest
from pipeline.config import Document


class ChainFolders(NamedTuple):
    """Where a chain keeps things."""

    work: Path  # on this machine: runs, logs, records of what is finished
    store: str  # a folder or s3:// prefix: data and checkpoints


class StepKind(abc.ABC):
    """One kind of step.

    A step is described by a document, which `complete` finishes with where the step writes, and which `run` validates.
    A step that was interrupted is run again with the same document, and has to resume or start over by its own means.
    """

    trained_by_ranks = False  # driven by the chain's own process, on a worker group; all others run in a child process

    @abc.abstractmethod
    def output(self, name: str, document: Document, folders: ChainFolders) -> str:
        """What "@name" stands for, of a completed document."""

    def complete(self, name: str, document: Document, folders: ChainFolders) -> Document:
        """The document with defaults for where the step writes."""
        return document

    def needs_ray(self, document: Document) -> bool:
        """Whether Ray has to be there before the step starts."""
        return False

    def may_delete(self, name: str, document: Document, folders: ChainFolders) -> bool:
        """Whether doing the step over may delete its output: it lies where the chain put it."""
        return True

    def run(self, document: Document, *, where: str, output: str, stop: StopRequest) -> dict[str, Any]:
        """Run the step in this process; returns a summary, which the chain keeps and shows.

        Raises:
            UserError: the document, or what it names, is wrong.
            Stopped: `stop` was requested; running the step again goes on.
        """
        raise NotImplementedError
