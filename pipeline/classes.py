"""The rules on class names: what a label means, and when two things that use labels mean the same by them.

A label is a number; a data set's manifest names the classes that the numbers stand for, and a head has a row for each.
Nothing may give a label or a row another meaning than it had, so lists of names are compared wherever labels, heads
and data sets meet:

- *Numbers are what classes without names are called* ("0", "1", ...). Such a list agrees with any names of the same
  number: it doesn't say what it means. Any two other lists must be the same, in the same order.
- *Training sets* may name different classes as long as the stage doesn't read labels (`Stage.label_use`); a list that
  all of them share is the training data's, else it has none.
- *Evaluation sets* must name the training data's classes where the stage compares labels with them. A set that names
  none passes with a warning, since it usually has no labels.
- *A checkpoint* keeps the names its stage learnt. A resumed run must have the same; a head that starts from another
  run's must have been learnt for the same classes.
- *Weights without names* get them from the data they are measured on; *neighbours* vote by the training set's labels,
  whatever the weights learnt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.config import Config
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.errors import CheckpointError, ConfigError, DataError, UserError
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts, Stage
from pipeline.stages.label_use import LEARNT, LabelUse

TRAIN = "train"
"""What evaluations call the training set."""
VOTES = LabelUse("is measured by the labels of neighbours in the training set")

log = logging.getLogger("vitrail")


def numbered(count: int) -> tuple[str, ...]:
    """Names for classes of which only the number is known."""
    return tuple(str(number) for number in range(count))


def difference(names: Sequence[str], expected: Sequence[str]) -> str:
    """How two lists of classes differ: in number, or which is the first that has another name."""
    if len(names) != len(expected):
        count, expected_count = (f"{len(some)} classes" if some else "none" for some in (names, expected))
        return f"{count}, not {expected_count}"
    number = next(i for i, pair in enumerate(zip(names, expected, strict=True)) if pair[0] != pair[1])
    return f"class {number} is {names[number]!r}, not {expected[number]!r}"


def _agree(before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether labels mean the same, as far as can be told: a list of numbers agrees with any names."""
    return tuple(before) in (tuple(now), numbered(len(now)))


def shared_classes(lists: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The class names of data sets that all have the same; else ()."""
    first, *others = lists
    return tuple(first) if all(names == first for names in others) else ()


def check_classes(
    classes: Sequence[str], whose: str, others: Mapping[str, Manifest], stage: str, use: LabelUse
) -> None:
    """Raise ConfigError for the first of `others`, under the place that names it, with other classes than these."""
    for where, manifest in others.items():
        if manifest.classes != tuple(classes):
            raise ConfigError(
                f"its labels aren't those of {whose}: {difference(manifest.classes, classes)}; "
                f"and stage {stage!r} {use.why}",
                where=where,
                fix=f"prepare all sets with the same list of classes{use.instead}",
            )


def check_training_sets(sets: Sequence[Manifest], stage: str, use: LabelUse | None) -> None:
    """Raise ConfigError for training sets of different classes, where the stage needs one list of them."""
    if use is not None:
        first, *others = sets
        check_classes(first.classes, first.url, {f"data.train: {other.url}": other for other in others}, stage, use)


def check_evaluation_sets(
    train: Sequence[Manifest], sets: Mapping[str, Manifest], stage: str, use: LabelUse | None
) -> None:
    """Raise ConfigError for an evaluation set whose labels a stage would take for other classes than they are of; warn
    of those that don't say. Training data that name no classes leave nothing to compare with.
    """
    classes = shared_classes(manifest.classes for manifest in train)
    if use is not None and classes:
        named = {f"data.evaluate.{name}: {manifest.url}": manifest for name, manifest in sets.items()}
        check_classes(classes, train[0].url, _with_classes(named), stage, use)
        warn_of_unnamed(sets.values())


def warn_of_unnamed(sets: Iterable[Manifest]) -> None:
    """Such a set usually has no labels; where it has some, only the user can know what they mean."""
    for manifest in sets:
        if not manifest.classes:
            log.warning(
                "%s names no classes: if it has labels they are taken for numbers of the training data's", manifest.url
            )


def learnt_classes(stage: Stage) -> tuple[str, ...]:
    """Names of the classes that a stage learns, in the order of its rows; () for a stage that learns none."""
    return () if type(stage).class_rows is None else tuple(stage.data.classes)


def class_parameters(stage: Stage) -> list[str]:
    """The parameters and buffers of a stage that have rows of classes: those that one class more would make larger."""
    if type(stage).class_rows is None:
        return []
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        larger = type(stage)(stage.options, stage.data._replace(classes=(*stage.data.classes, ""))).state_dict()
    return [name for name, value in stage.state_dict().items() if value.shape != larger[name].shape]


def recorded_classes(info: Mapping[str, Any]) -> tuple[str, ...]:
    """The `learnt_classes` that a checkpoint's or a weight file's `info` names; () where it names none, as those of
    earlier versions.
    """
    return tuple(info.get("classes") or ())


def checkpoint_classes(
    config: Mapping[str, Any], info: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: str
) -> tuple[str, ...]:
    """The names of the classes that a run's stage learnt. Where its checkpoint names none, those in the training data's
    manifest; where that is out of reach or names others, numbers. Empty for a stage that learns no classes.

    Args:
        config: of the run, with its stage and training data.
        info: of the checkpoint.
        tensors: of the checkpoint.
        where: the checkpoint, for messages.
    """
    name, others = stage_class(str(config["stage"])).class_rows or ("", 0)
    if name not in tensors:
        return ()
    count = tensors[name].shape[0] - others
    recorded = recorded_classes(info)
    if len(recorded) == count and recorded != numbered(count):
        return recorded
    try:
        train = config["data"]["train"]
        classes = read_manifest(str(train if isinstance(train, str) else train[0]["url"])).classes
    except (UserError, OSError, KeyError):
        classes = ()
    if len(classes) == count:
        return classes
    if not recorded:
        log.warning(
            "%s keeps no names of classes, being of an earlier version, and those of its training data can't be read: "
            "they are numbered",
            where,
        )
    return numbered(count)


def check_resumed(stage: Stage, recorded: Sequence[str], *, where: str) -> None:
    """Compare the classes of the data with those that the checkpoint's rows were learnt for, `recorded` (() for
    unknown). Classes that were but numbers may have got names since.

    Raises:
        DataError: a row would mean another class than before.
    """
    classes = learnt_classes(stage)
    if recorded and classes and not _agree(recorded, classes):
        raise DataError(
            f"the training set's classes aren't those this run has learnt: {difference(classes, recorded)}",
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
    classes = learnt_classes(stage)
    before = tuple(recorded) or numbered(len(weights[name]) - others if name in weights else len(classes))
    if not _agree(before, classes):
        without = ", ".join(_prefixes_without(rows, stage.state_dict(), tuple(prefixes)))
        raise CheckpointError(
            f"its {taken[0]} was learnt for other classes than the training set's: {difference(before, classes)}",
            where=where,
            fix=f"prepare the data with the same list of classes, or begin the head anew: init_prefixes=[{without}]",
        )
    if before != classes and ranks.world().rank == 0:
        log.warning(
            "%s doesn't say which classes it learnt: its head's are taken for the training set's, in their order", where
        )


def facts_to_measure(
    stage: str, options: Config, classes: Sequence[str], manifests: Mapping[str, Manifest], *, votes: bool
) -> DataFacts:
    """What a stage that is to be measured must know of the data sets: the classes it learnt; those of neighbours'
    labels, which are the training set's; and each set's own.

    Args:
        stage: its name.
        classes: that the weights name.
        manifests: by name, the training set's as "train".
        votes: neighbours on the trunk's features are measured, not the stage's own evaluations.

    Raises:
        ConfigError: a set's labels mean other classes than the weights' head or the training set's, and matter.
    """
    cls = stage_class(stage)
    of_sets = {name: manifest.classes for name, manifest in manifests.items() if name != TRAIN}
    training = manifests[TRAIN].classes if TRAIN in manifests else ()
    if votes:
        _check_votes(manifests, stage)
        return DataFacts(tuple(classes) or training, 0, of_sets)
    use = cls.label_use(options)
    if use is not None and (training or classes):
        warn_of_unnamed(manifests.values())
    if cls.class_rows is not None:
        return DataFacts(_named_by_data(stage, tuple(classes), manifests), 0, of_sets)
    if use is not None and training:
        check_classes(training, manifests[TRAIN].url, _by_url(manifests), stage, use)
    return DataFacts(training or tuple(classes), 0, of_sets)


def _check_votes(manifests: Mapping[str, Manifest], stage: str) -> None:
    """Refuse neighbours where labels can't be compared, or where there are none."""
    train = manifests.get(TRAIN)
    if train is None:  # the evaluation raises for it
        return
    if not train.classes:
        raise ConfigError(
            "it has no labels for neighbours to vote with", where=train.url, fix="give a labelled data set as train"
        )
    check_classes(train.classes, train.url, {other.url: other for other in manifests.values()}, stage, VOTES)


def _named_by_data(stage: str, classes: tuple[str, ...], manifests: Mapping[str, Manifest]) -> tuple[str, ...]:
    """The names of the classes that weights learnt: their own; where those are but numbers, the data's.

    Raises:
        ConfigError: a set's labels mean other classes than the weights' or another set's.
    """
    labelled = _by_url(manifests)
    unnamed = numbered(len(classes))
    if classes != unnamed:
        check_classes(classes, "the weights", labelled, stage, LEARNT)
        return classes
    if not labelled:
        return classes
    first = next(iter(labelled.values()))
    check_classes(first.classes, first.url, labelled, stage, LEARNT)
    if not classes:
        return first.classes
    if first.classes == unnamed[: len(first.classes)]:  # numbers on both sides
        return classes
    if len(first.classes) != len(classes):
        check_classes(classes, "the weights", labelled, stage, LEARNT)
    return first.classes


def _by_url(manifests: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """The sets that name classes, by URL."""
    return _with_classes({manifest.url: manifest for manifest in manifests.values()})


def _with_classes(manifests: Mapping[str, Manifest]) -> dict[str, Manifest]:
    return {where: manifest for where, manifest in manifests.items() if manifest.classes}


def _prefixes_without(rows: Sequence[str], names: Iterable[str], prefixes: tuple[str, ...]) -> list[str]:
    """The shortest prefixes, made of whole parts of names, that cover what `prefixes` cover but for `rows`."""
    wanted = [name for name in names if name.startswith(prefixes) and name not in rows]
    shortest: dict[str, None] = {}
    for name in wanted:
        parts = name.split(".")
        candidates = [".".join(parts[: i + 1]) + "." * (i + 1 < len(parts)) for i in range(len(parts))]
        free = (
            candidate
            for candidate in candidates
            if candidate.startswith(prefixes) and not any(row.startswith(candidate) for row in rows)
        )
        shortest[next(free, name)] = None
    return list(shortest)
