"""Verbs about data sets."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli.options import AsJson, Overrides, Ray
from launch.cli.output import log_to_stderr, reply, say


def prep(
    config: Annotated[str, typer.Argument(help="The data set's YAML file.")],
    overrides: Overrides = None,
    retry: Annotated[
        list[str] | None,
        typer.Option("--retry", metavar="REASON", help="Try inputs refused for this reason again (may be repeated)."),
    ] = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Build a data set of shards; run again to resume, or to append what the source has gained."""
    from launch.chain.kinds.prep import run_prep
    from launch.stopping import StopRequest
    from pipeline.config import load

    log_to_stderr()
    with StopRequest().on_signals() as stop:
        document = load(config, overrides or [])
        summary = run_prep(document, where=config, retry=retry or [], ray_address=ray, stop=stop)
    lines = [
        f"{name}: {split['samples']} samples in {split['shards']} shards" for name, split in summary["splits"].items()
    ]
    account = f"{summary['written']} of {summary['inputs']} inputs written"
    for kind in ("filtered", "failed"):
        counts = ", ".join(f"{count} {reason}" for reason, count in summary[kind].items())
        account += f"; {kind}: {counts}" if counts else ""
    lines.append(account)
    reply(summary, [*lines, f"data set: {summary['output']}"], as_json)


def index(
    url: Annotated[str, typer.Argument(metavar="URL", help="Folder of the tars; s3:// too.")],
    to: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where manifest and indices go; default: beside the tars.")
    ] = None,
    match: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only tars with such names, such as 'train-*.tar'.")
    ] = "*",
    classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="A JSON list, names of the labels 0, 1, ...; default: numbers.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out tars that can't be used.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Tars read at a time.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Make existing WebDataset tars a data set as they are; run again to resume, or after they have changed."""
    from launch.index import index_dataset
    from launch.stopping import StopRequest

    with StopRequest().on_signals() as stop:
        document, lines = index_dataset(
            url, to=to, match=match, classes=classes, skip_bad=skip_bad, workers=workers, stop=stop, say=say
        )
    reply(document, lines, as_json)


def verify(
    dataset: Annotated[str, typer.Argument(help="Folder of a data set (with manifest.json), or of its splits.")],
    as_json: AsJson = False,
) -> None:
    """Check every shard and sample of a data set against its manifest."""
    from launch.inspect import verify_dataset

    document, lines, good = verify_dataset(dataset, say)
    reply(document, lines, as_json, code=0 if good else 2)
