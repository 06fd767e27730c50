"""Arguments and options that several verbs take."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the configuration.")]
WeightSource = Annotated[
    str,
    typer.Argument(metavar="RUN|WEIGHTS", help="A run directory, one checkpoint's folder, or a weight file or folder."),
]
From = Annotated[
    str | None, typer.Option("--from", metavar="FORMAT", help="The weights' format; default: our own, or a run.")
]
KnownFacts = Annotated[
    list[str] | None,
    typer.Option("--known", metavar="NAME=VALUE", help="What tensors don't tell, such as heads=12."),
]
StageSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change an option of the stage, such as mask_ratio=0.5."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, last on stdout.")]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="An existing Ray; default: RAY_ADDRESS, else one of our own."),
]
Redo = Annotated[
    list[str] | None, typer.Option("--redo", metavar="STEP", help="Do this step over, and what builds on it.")
]
Machines = Annotated[int | None, typer.Option("--machines", min=1, help="Machines to train on; default: 1.")]
FormerMachines = Annotated[int | None, typer.Option("--nodes", min=1, hidden=True)]
Which = Annotated[
    str, typer.Option("--weights", help="Of a run: ema, raw (as trained), or auto: the moving average if it keeps one.")
]
Work = Annotated[str | None, typer.Option("--work", metavar="DIR", help="Folder for runs, logs and what is finished.")]
