"""The contract of a backend: somewhere that jobs run, reachable again by name from a new client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

State = Literal["pending", "running", "succeeded", "stopped", "failed"]


class Job(NamedTuple):
    """One command to run on a cluster. Secrets never stand in it: workers take them from their surroundings."""

    name: str  # unique; submitting a name that runs re-attaches
    command: tuple[str, ...]  # a vitrail command line, e.g. ("vitrail", "train", "configs/...")
    environment: Mapping[str, str] = {}
    resources: Mapping[str, Any] = {}  # nodes, workers, gpus as the cluster's YAML gives them


class Handle(Protocol):
    """A submitted job."""

    name: str

    def status(self) -> State: ...

    def logs(self, follow: bool = False) -> Iterator[str]: ...

    def stop(self, grace_s: float) -> State: ...

    def result(self) -> int | None:
        """Exit code, None while it runs."""


class Backend(Protocol):
    """Where jobs run; one per cluster file in configs/cluster/."""

    def submit(self, job: Job) -> Handle: ...

    def find(self, name: str) -> Handle | None: ...
