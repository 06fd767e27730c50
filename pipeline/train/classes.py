"""The classes that a stage learnt: checkpoints keep their names, so that no row of a head changes its meaning."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.convert.weights import numbered
from pipeline.errors import CheckpointError, DataError
from pipeline.stages.base import Stage

log = logging.getLogger("vitrail")


def learnt_classes(stage: Stage) -> tuple[str, ...]:
    """Names of the classes that a stage learns, in the order of its rows; () for a stage that learns none."""
    return () if type(stage).class_rows is None else tuple(stage.data.classes)


def recorded_classes(info: Mapping[str, Any]) -> tuple[str, ...]:
    """The `learnt_classes` that a run's checkpoint, or a file of ours, tells of; () where it tells of none, as those
    of earlier versions.
    """
    return tuple(info.get("classes") or ())


def check_resumed(stage: Stage, recorded: Sequence[str], *, where: str) -> None:
    """Compare the classes of the data with those that the checkpoint's rows were learnt for, `recorded` (() for
    unknown). Classes that were but numbers may have got names since.

    Raises:
        DataError: a row would mean another class than before.
    """
    ours = learnt_classes(stage)
    if recorded and ours and not _same(recorded, ours):
        raise DataError(
            f"the training set's classes aren't those this run has learnt: {difference(ours, recorded)}",
            where=where,
            fix="put its list of classes back, or give the run a new name",
        )


def check_initial(
    stage: Stage, weights: Mapping[str, Tensor], recorded: Sequence[str], prefixes: Sequence[str], *, where: str
) -> None:
    """Compare the classes of the data with those of another run's head, where it is to be taken over; warn where that
    run doesn't say what they are.

    Args:
        weights: of the other run.
        recorded: the names of its classes, () for unknown.
        prefixes: of the parameters to be taken.
        where: the other run, for messages.

    Raises:
        CheckpointError: a row would mean another class than it was learnt for.
    """
    rows = class_parameters(stage)
    taken = [name for name in rows if name in weights and name.startswith(tuple(prefixes))]
    if not taken:
        return
    name, others = type(stage).class_rows or ("", 0)
    ours = learnt_classes(stage)
    theirs = tuple(recorded) or numbered(len(weights[name]) - others if name in weights else len(ours))
    if not _same(theirs, ours):
        without = ", ".join(_prefixes_without(rows, stage.state_dict(), tuple(prefixes)))
        raise CheckpointError(
            f"its {taken[0]} was learnt for other classes than the training set's: {difference(theirs, ours)}",
            where=where,
            fix=f"prepare the data with the same list of classes, or begin the head anew: init_prefixes=[{without}]",
        )
    if theirs != ours and ranks.world().rank == 0:
        log.warning(
            "%s doesn't say which classes it learnt: its head's are taken for the training set's, in their order", where
        )


def class_parameters(stage: Stage) -> list[str]:
    """The parameters and buffers of a stage that have rows of classes: those that one class more would make larger."""
    if type(stage).class_rows is None:
        return []
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        larger = type(stage)(stage.options, stage.data._replace(classes=(*stage.data.classes, ""))).state_dict()
    return [name for name, value in stage.state_dict().items() if value.shape != larger[name].shape]


def difference(found: Sequence[str], wanted: Sequence[str]) -> str:
    """How two lists of classes differ: in number, or which is the first that has another name."""
    if len(found) != len(wanted):
        here, there = (f"{len(some)} classes" if some else "none" for some in (found, wanted))
        return f"{here}, not {there}"
    number = next(i for i, names in enumerate(zip(found, wanted, strict=True)) if names[0] != names[1])
    return f"class {number} is {found[number]!r}, not {wanted[number]!r}"


def _same(before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether labels mean the same, as far as can be told: numbers are what classes are called that have no names."""
    return tuple(before) in (tuple(now), numbered(len(now)))


def _prefixes_without(rows: Sequence[str], names: Iterable[str], prefixes: tuple[str, ...]) -> list[str]:
    """The shortest prefixes, whole parts of names, under which all lies that is under `prefixes` but `rows`."""
    wanted = [name for name in names if name.startswith(prefixes) and name not in rows]
    found: dict[str, None] = {}
    for name in wanted:
        parts = name.split(".")
        tried = [".".join(parts[: i + 1]) + "." * (i + 1 < len(parts)) for i in range(len(parts))]
        whole = (one for one in tried if one.startswith(prefixes) and not any(row.startswith(one) for row in rows))
        found[next(whole, name)] = None
    return list(found)
