"""The kinds of steps a chain may have, by the name its file gives them: a new kind is one file and one line here."""

from __future__ import annotations

from launch.chain.kinds.base import StepKind
from pipeline.config import by_dotted_name, entry_of

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
    kind: StepKind = by_dotted_name(entry_of(KINDS, name, what="kind of step", where=where), where=where)()
    return kind
