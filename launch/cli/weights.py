"""Verbs about what was trained: looking at it, measuring it, taking it elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli.options import AsJson, From, KnownFacts, StageSettings, WeightSource, Which
from launch.cli.output import log_to_stderr, reply, say


def predict(
    source: WeightSource,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, folders, globs, s3:// or http(s):// URLs.")
    ],
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for pictures and predictions.json; s3:// too.")
    ] = "predictions",
    source_format: From = None,
    known: KnownFacts = None,
    settings: StageSettings = None,
    questions: Annotated[
        list[str] | None,
        typer.Option("--ask", metavar="KEY=VALUE", help="What the stage wants to be asked, such as 'texts=[a cat]'."),
    ] = None,
    which: Which = "auto",
    attention: Annotated[bool, typer.Option("--attention", help="Show where the trunk looks, head by head.")] = False,
    block: Annotated[int, typer.Option(help="Block whose attention is shown; -1 is the last.")] = -1,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of masks and whatever else is drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a trained stage makes of images: reconstructions, classes, attention, as pictures and JSON."""
    from launch import inference
    from launch.replies import SourceFlags, mapping_of
    from pipeline.inference.predicting import PredictRequest

    request = PredictRequest(mapping_of(questions or []), attention, block, batch, seed)
    flags = SourceFlags(source, source_format, known or [], settings or [], which)
    document, lines, good = inference.predict(flags, images, out, request, say)
    reply(document, lines, as_json, code=0 if good else 2)


def evaluate(
    source: WeightSource,
    sets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]DATASET", help="Data sets to measure on; default: those of the run."),
    ] = None,
    train: Annotated[
        str | None, typer.Option(metavar="DATASET", help="The training set, for neighbours; default: the run's.")
    ] = None,
    knn: Annotated[
        bool, typer.Option("--knn", help="Nearest neighbours on the trunk's features, whatever the stage.")
    ] = False,
    pooling: Annotated[str, typer.Option(help="Of the neighbours' features: avg, cls or avg_with_cls.")] = "avg",
    k: Annotated[int, typer.Option(min=1, help="Neighbours.")] = 20,
    temperature: Annotated[float, typer.Option(min=1e-4, help="Of the neighbours' votes.")] = 0.07,
    source_format: From = None,
    known: KnownFacts = None,
    settings: StageSettings = None,
    which: Which = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode; 0: this one.")] = 0,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write figures and details as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run, or any weights, on data sets, without training."""
    from typing import get_args

    from launch import inference
    from launch.replies import SourceFlags
    from pipeline.errors import ConfigError
    from pipeline.inference.evaluating import KnnOptions
    from pipeline.models.trunk.pooling import Pooling

    log_to_stderr()
    if pooling not in get_args(Pooling):
        raise ConfigError(f"no pooling {pooling!r}", where="--pooling", fix=f"use {', '.join(get_args(Pooling))}")
    document, lines = inference.evaluate(
        SourceFlags(source, source_format, known or [], settings or [], which),
        sets or [],
        say,
        train=train,
        knn=KnnOptions(pooling, k, temperature) if knn else None,  # type: ignore[arg-type]  # checked above
        batch=batch,
        workers=workers,
        out=out,
    )
    reply(document, lines, as_json)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A weight file, a folder of one, or a run directory.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="The file to write, or a folder for some formats.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="Whose names and layout to write.")],
    source_format: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="SRC's format; default: our own, or a run.")
    ] = None,
    known: KnownFacts = None,
    which: Which = "auto",
    as_json: AsJson = False,
) -> None:
    """Translate weights from and to other projects' formats."""
    from launch import inference
    from launch.replies import SourceFlags

    flags = SourceFlags(source, source_format, known or [], which=which)
    document, lines = inference.convert(flags, target, to)
    reply(document, lines, as_json)


def export(
    source: Annotated[str, typer.Argument(metavar="RUN|WEIGHTS", help="A run of stage sam, or a weight file of one.")],
    target: Annotated[str, typer.Argument(metavar="DIR", help="Folder for encoder.onnx and decoder.onnx; s3:// too.")],
    source_format: From = None,
    known: KnownFacts = None,
    which: Which = "auto",
    as_json: AsJson = False,
) -> None:
    """Write Segment Anything as ONNX graphs, checked against the model."""
    from launch import inference
    from launch.replies import SourceFlags

    flags = SourceFlags(source, source_format, known or [], which=which)
    document, lines = inference.export(flags, target)
    reply(document, lines, as_json)
