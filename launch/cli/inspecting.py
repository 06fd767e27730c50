"""Verbs that tell: about this machine, runs, data sets."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli.options import AsJson
from launch.cli.output import reply


def doctor(
    storage: Annotated[
        list[str] | None, typer.Argument(metavar="URL", help="Folders or s3:// prefixes to try as well.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what this machine offers, and whether storage can be reached."""
    from launch.doctor import examine

    findings = examine(storage or [])
    lines = [f"{'ok ' if f.good else 'BAD'} {f.name:<12} {f.finding}" for f in findings]
    reply({"findings": [f._asdict() for f in findings]}, lines, as_json, code=0 if all(f.good for f in findings) else 1)


def show(
    place: Annotated[str, typer.Argument(help="A run directory or a data set.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Of a run: read every checkpoint and compare its hashes.")
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="Of a data set: samples of each split to show.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Show a run's state, figures and checkpoints, or a data set's counts and samples."""
    from launch.inspect import describe

    document, lines = describe(place, verify=verify, num_samples=samples)
    reply(document, lines, as_json)


def runs(
    folder: Annotated[str, typer.Argument(help="Folder of run directories.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder."""
    from launch.inspect import list_runs

    documents, lines = list_runs(folder)
    reply({"runs": documents}, lines, as_json)


def report(
    sources: Annotated[list[str], typer.Argument(metavar="SPEC|RUN", help="A report's YAML file, or run directories.")],
    out: Annotated[str, typer.Option(metavar="PATH", help="HTML file or folder to write.")] = "report",
    as_json: AsJson = False,
) -> None:
    """Write an HTML report on one run or several."""
    from launch.inspect import report_on

    written = report_on(sources, out)
    reply({"report": written}, [f"report: {written}"], as_json)
