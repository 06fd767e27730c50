"""One node of a chain that isn't training, run in this process: scenes, preparation, the report.

    python -m launch.node < request.json

The request is a JSON object with `kind`, `document`, `where` and `output`; the answer is one JSON object, last on
stdout, with exit code 0, 2 (then it holds `error`) or 1.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.attempts import error_document
from launch.parent import watch_parent
from launch.stopping import StopRequest
from pipeline import config as configs
from pipeline import storage
from pipeline.config import Document
from pipeline.errors import Stopped, UserError

if TYPE_CHECKING:
    from data_prep.account import Progress

log = logging.getLogger("vitrail")


def run_scenes(document: Document, *, where: str, output: str) -> dict[str, Any]:
    """Render scenes into `output`; returns a summary."""
    from data_prep.scenes.render import ScenesConfig, write_scenes

    config = configs.validate(ScenesConfig, document, where=where)
    return write_scenes(config, output)._asdict()


def run_prep(
    document: Document,
    *,
    where: str,
    retry: Sequence[str] = (),
    ray_address: str | None = None,
    stop: StopRequest | None = None,
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
    from launch import cluster

    config = configs.validate(PrepConfig, document, where=where)
    if config.ray.workers != 0:
        cluster.connect(ray_address or config.ray.address)
    stop = stop or StopRequest()
    stop.take_signals()  # Ray put its own handlers in their place
    report = build(config, retry_reasons=retry, progress=_TellNowAndThen(), stop=stop.requested)
    return {"output": config.output, **report.document()}


class _TellNowAndThen:
    """Logs where a build stands: a phase's first and last word, and one every few seconds between."""

    def __init__(self, every_s: float = 5.0) -> None:
        self._every_s = every_s
        self._phase = ""
        self._told = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase != self._phase or progress.done == progress.total or now - self._told >= self._every_s:
            self._phase, self._told = progress.phase, now
            log.info("%s: %s", progress.phase, progress)


def run_report(document: Document, *, where: str, output: str) -> dict[str, Any]:
    """Write a report into folder `output`."""
    from pipeline.report.html import write_report
    from pipeline.report.spec import ReportSpec

    spec = configs.validate(ReportSpec, document, where=where)
    return {"report": write_report(spec, output)}


def main() -> int:
    """Read the request, run it, answer; returns the exit code."""
    parent = os.environ.get("VITRAIL_PARENT")
    if parent:
        watch_parent(int(parent))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("aiobotocore").setLevel(logging.WARNING)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    request = json.load(sys.stdin)
    where, output, document = request["where"], request["output"], request["document"]
    try:
        if request["kind"] == "scenes":
            answer = run_scenes(document, where=where, output=output)
        elif request["kind"] == "prep":
            answer = run_prep(document, where=where)
        elif request["kind"] == "report":
            if not storage.is_remote(output):
                Path(output).mkdir(parents=True, exist_ok=True)
            answer = run_report(document, where=where, output=output)
        else:
            raise ValueError(f"no node of kind {request['kind']!r} runs here")
    except Stopped as stopped:
        log.info("%s", stopped)
        return Stopped.exit_code
    except UserError as error:
        print(json.dumps({"error": error_document(error)}))
        return error.exit_code
    print(json.dumps(answer, default=str))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
