"""The kinds of steps a chain may have, by the name its file gives them: a new kind is one file and one line here."""

from __future__ import annotations

import difflib
import importlib

from launch.chain.kinds.base import StepKind
from pipeline.errors import ConfigError

KINDS: dict[str, str] = {
    "scenes": "launch.chain.kinds.scenes:ScenesStep",
    "prep": "launch.chain.kinds.prep:PrepStep",
    "index": "launch.chain.kinds.index:IndexStep",
    "train": "launch.chain.kinds.train:TrainStep",
    "eval": "launch.chain.kinds.eval:EvalStep",
    "convert": "launch.chain.kinds.convert:ConvertStep",
    "export": "launch.chain.kinds.export:ExportStep",
    "report": "launch.chain.kinds.report:ReportStep",
}
"""Where each kind's class is."""


def step_kind(name: str, *, where: str = "kind") -> StepKind:
    """The kind called `name`.

    Raises:
        ConfigError: there is no such kind; names the nearest.
    """
    if name not in KINDS:
        close = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.5)
        fix = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(KINDS)}"
        raise ConfigError(f"no kind of step {name!r}", where=where, fix=fix)
    module, _, attribute = KINDS[name].partition(":")
    kind: StepKind = getattr(importlib.import_module(module), attribute)()
    return kind
