"""The whole way through on this machine: `vitrail demo`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from launch.chain.graph import Chain, load_chain
from launch.chain.records import ChainStepResult
from launch.chain.runner import ChainRunner, only_one
from launch.display import Display
from launch.progress import headline
from launch.s3_server import S3Server, find_rclone
from launch.stopping import StopRequest
from pipeline import storage

BUCKET = "vitrail-demo"


class DemoOptions(NamedTuple):
    """What a demo is to be like."""

    work: str | None = None  # where everything is kept; None: demo, or demo/quick, demo/own, demo/own_quick
    quick: bool = False  # shorter, smaller runs, which show the way but teach little
    data: str | None = None  # a person's own table of pairs (a file, a folder or a URL) instead of rendered scenes
    overrides: Sequence[str] = ()  # "a.b=c" changes to the chain
    redo: Sequence[str] = ()  # steps to do over
    ray_address: str | None = None


class DemoResult(NamedTuple):
    """What came of a demo."""

    steps: dict[str, ChainStepResult]
    report: str | None  # where the report is, once it has been written


def run_demo(options: DemoOptions, *, stop: StopRequest, display: Display) -> DemoResult:
    """Run the demo's chain in its folder, resuming where an earlier command stopped.

    Raises:
        UserError: the folder is in use, the configuration is wrong, or another `--data`/`--quick` was begun in it.
    """
    variant, data = _variant(options.quick, options.data), options.data
    folder = Path("demo") if variant == "demo" else Path("demo") / variant
    if options.work is not None:
        folder = Path(options.work)
    with only_one(folder), _object_store(folder, display.line, wanted=not _is_remote(data)) as store:
        chain = load_demo(work=folder, store=store, quick=options.quick, data=data, overrides=options.overrides)
        runner = ChainRunner(chain, stop=stop, display=display, ray_address=options.ray_address)
        results = runner.run(options.redo)
    report = results.get("report")
    written = report.summary.get("report") if report is not None else None
    return DemoResult(results, str(written) if written else None)


def load_demo(*, work: Path, store: str, quick: bool, data: str | None, overrides: Sequence[str]) -> Chain:
    """The chain that the demo's options ask for."""
    if data is not None:
        pairs = data if _is_remote(data) else str(Path(data).resolve())
        overrides = [f"steps.pairs.config.source.url={json.dumps(pairs)}", *overrides]
    return load_chain(f"configs/demo/{_variant(quick, data)}.yaml", overrides, work=str(work), store=store)


def key_figures(results: dict[str, ChainStepResult]) -> list[tuple[str, str, float]]:
    """(step, figure, value) of the main things the steps measured, in the chain's order."""
    rows: list[tuple[str, str, float]] = []
    for name, result in results.items():
        figures = headline(result.summary.get("figures", {}))
        rows += [(name, figure, float(value)) for figure, value in figures.items()]
    return rows


def _variant(quick: bool, data: str | None) -> str:
    if data is None:
        return "quick" if quick else "demo"
    return "own_quick" if quick else "own"


def _is_remote(data: str | None) -> bool:
    return data is not None and storage.is_remote(data)


@contextmanager
def _object_store(work: Path, say: Callable[[str], None], *, wanted: bool) -> Iterator[str]:
    """An S3 bucket of our own, reachable through this process's environment, or a plain folder instead.

    Args:
        wanted: False where the environment's own S3 has to stay reachable.
    """
    if not wanted or find_rclone() is None:
        why = "no rclone binary for this machine" if wanted else "the data lie on another S3 server"
        say(f"{why}: a plain folder takes the place of our own S3 server")
        yield str(work / "store")
        return
    before = dict(os.environ)
    with S3Server(work / "s3", log=work / "s3.log") as server:
        store = server.bucket(BUCKET)
        _set_environment(server.environment_of(before))
        say(f"S3 server at {server.endpoint}, its files in {work / 's3'}")
        try:
            yield store
        finally:
            _set_environment(before)


def _set_environment(wanted: dict[str, str]) -> None:
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update(wanted)
