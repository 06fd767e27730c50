"""Data preparation: shards from whatever source the document names."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.chain.kinds.base import ChainFolders, StepKind
from launch.stopping import StopRequest
from pipeline import config as configs
from pipeline import storage
from pipeline.config import Document

if TYPE_CHECKING:
    from data_prep.account import Progress

log = logging.getLogger("vitrail")


class PrepStep(StepKind):
    """Builds a data set, finishes it, or appends to it; its document is a `PrepConfig`."""

    def output(self, name: str, document: Document, folders: ChainFolders) -> str:
        return str(document["output"])

    def complete(self, name: str, document: Document, folders: ChainFolders) -> Document:
        return configs.merge({"output": self._default_output(name, folders)}, document)

    def needs_ray(self, document: Document) -> bool:
        ray = document.get("ray", {})
        return bool(ray.get("tasks", ray.get("workers")) != 0)  # "workers" is the key's former name

    def may_delete(self, name: str, document: Document, folders: ChainFolders) -> bool:
        return str(document["output"]) == self._default_output(name, folders)

    def run(self, document: Document, *, where: str, output: str, stop: StopRequest) -> dict[str, Any]:
        return run_prep(document, where=where, stop=stop)

    @staticmethod
    def _default_output(name: str, folders: ChainFolders) -> str:
        return storage.join(folders.store, "data", name)


def run_prep(
    document: Document, *, where: str, stop: StopRequest, retry: Sequence[str] = (), ray_address: str | None = None
) -> dict[str, Any]:
    """Build a data set, finish it, or append to it; returns its account.

    Args:
        retry: reasons for which refused inputs are tried again.

    Raises:
        UserError: as `data_prep.build.build`.
        Stopped: `stop` was requested.
    """
    from data_prep.build import build
    from data_prep.config import PrepConfig
    from pipeline import ray_cluster

    config = configs.validate(PrepConfig, document, where=where)
    if config.ray.tasks != 0:
        ray_cluster.connect(ray_address or config.ray.address)
    stop.take_signals()  # Ray put its own handlers in their place
    report = build(config, retry_reasons=retry, progress=_BuildProgressLog(), stop=stop.requested)
    return {"output": config.output, **report.document()}


class _BuildProgressLog:
    """Logs where a build stands: when a phase begins and ends, and every few seconds between."""

    def __init__(self, every_s: float = 5.0) -> None:
        self._every_s = every_s
        self._phase = ""
        self._logged_at = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase != self._phase or progress.done == progress.total or now - self._logged_at >= self._every_s:
            self._phase, self._logged_at = progress.phase, now
            log.info("%s: %s", progress.phase, progress)
