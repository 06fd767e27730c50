"""A chain: a graph of steps (data preparation, training, evaluation, reports), read from one YAML file.

    steps:
      pairs: {kind: prep, config: configs/prep/pairs.yaml}
      mae:   {kind: train, config: configs/pretrain/mae.yaml, ranks: 2, set: {data.train: "@pairs/train"}}

A string "@step" or "@step/suffix" stands for the other step's output (a data set folder, a run directory) and puts
this step after it. With `matrix: {seed: [0, 1, 2]}` at the top, a step that lists `matrix: [seed]` is run once per
value, as `step-seed0` and so on; "$seed" is the value, "@step" of such a step means the one with the same values, and
a list of all of them where the reader isn't in the matrix itself.

This module reads and checks; `launch.chain.runner` runs. What kinds of steps there are stands in `launch.chain.kinds`.
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import Field, PositiveInt

from launch.chain.kinds import step_kind
from launch.chain.kinds.base import ChainFolders, StepKind
from launch.workers.placement import PlacementRequest
from pipeline import config as configs
from pipeline.config import Config, Document
from pipeline.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(r"@([A-Za-z0-9][A-Za-z0-9_-]*)(/.*)?")


class StepConfig(Config):
    """One step of a chain as its file gives it."""

    renamed: ClassVar[Mapping[str, str]] = {
        "workers": "ranks",
        "nodes": "machines",
        "cpus_per_worker": "cpus_per_rank",
    }

    kind: str  # a name in launch.chain.kinds.KINDS
    config: str | dict[str, Any] = {}  # a YAML file, or the document itself
    set: dict[str, Any] = {}  # differences; keys may be dotted
    ranks: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """Ranks on each machine; [min, max] over all machines, elastic; None: one per GPU, or one where there are none."""
    machines: int = Field(default=1, gt=0)
    cpus_per_rank: int | None = Field(default=None, gt=0)  # None: a machine's cores are shared out among its ranks
    matrix: tuple[str, ...] = ()  # axes this step is repeated over
    after: tuple[str, ...] = ()  # steps that must have finished, beside those referred to


class ChainConfig(Config):
    """A chain as its file gives it."""

    renamed: ClassVar[Mapping[str, str]] = {"nodes": "steps"}

    steps: dict[str, dict[str, Any]] = Field(min_length=1)  # each a StepConfig
    matrix: dict[str, tuple[int | float | str, ...]] = {}
    work: str | None = None  # folder for runs, logs and what is finished; None: runs/<name of the file>
    store: str | None = None  # folder or s3:// prefix for data and checkpoints; None: <work>/store


class ChainStep(NamedTuple):
    """One step ready to be run: matrix expanded, references resolved."""

    name: str
    kind: str
    document: Document
    where: str
    output: str
    after: frozenset[str]
    fingerprint: str  # of the configuration as written and those of all steps before; not of folders
    request: PlacementRequest  # of a step that is trained by ranks


class Chain(NamedTuple):
    """The steps in an order in which they could run."""

    steps: dict[str, ChainStep]
    folders: ChainFolders
    where: str

    def downstream(self, names: Iterable[str]) -> set[str]:
        """The steps named and all that build on them."""
        affected = set(names)
        for step in self.steps.values():
            if step.after & affected:
                affected.add(step.name)
        return affected


class _Draft(NamedTuple):
    """A step with its matrix values bound, references still open."""

    name: str
    base: str  # name in the file
    config: StepConfig
    kind: StepKind
    values: dict[str, Any]
    document: Document
    where: str
    named: frozenset[str]  # steps referred to, as in the file


def load_chain(path: str, overrides: Sequence[str] = (), *, work: str | None = None, store: str | None = None) -> Chain:
    """Read and check a chain.

    Args:
        path: its YAML file, or a shipped one.
        overrides: "a.b=c" changes to the file, e.g. "steps.mae.set.length_samples=1000".
        work, store: override the file's.

    Raises:
        ConfigError: anything in it, or in a file it names, that is wrong: a cycle, an unknown step, a misspelt key.
    """
    config = configs.validate(ChainConfig, configs.load(path, overrides, _current_keys), where=path)
    work_folder = Path(work or config.work or f"runs/{Path(path).stem}")
    folders = ChainFolders(work_folder, (store or config.store or str(work_folder / "store")).rstrip("/"))
    drafts = _expand(config, path)
    by_base: dict[str, list[_Draft]] = {}
    for draft in drafts.values():
        by_base.setdefault(draft.base, []).append(draft)
    order = _order(drafts, by_base, path)
    steps: dict[str, ChainStep] = {}
    for name in order:
        steps[name] = _resolve(drafts[name], by_base, steps, folders)
    return Chain(steps, folders, path)


def _current_keys(document: Document) -> Document:
    """A chain's file, or a part of one, with the keys of earlier versions under today's names."""
    document = configs.current_keys(ChainConfig, document)
    steps = document.get("steps")
    if isinstance(steps, Mapping):
        current = {
            name: configs.current_keys(StepConfig, s) if isinstance(s, Mapping) else s for name, s in steps.items()
        }
        document["steps"] = current
    return document


def _expand(config: ChainConfig, path: str) -> dict[str, _Draft]:
    drafts: dict[str, _Draft] = {}
    for base, written in config.steps.items():
        where = f"{path}: steps.{base}"
        step = configs.validate(StepConfig, written, where=path, prefix=f"steps.{base}")
        kind = step_kind(step.kind, where=f"{where}.kind")
        if not _NAME.fullmatch(base):
            raise ConfigError("no valid step name", where=where, fix="use letters, digits, '-' and '_'")
        for axis in step.matrix:
            if axis not in config.matrix:
                raise ConfigError(
                    f"no axis {axis!r}", where=f"{where}.matrix", fix=_near(axis, config.matrix, "matrix")
                )
        raw, document_where = _document(step, path, where)
        for values in itertools.product(*(config.matrix[axis] for axis in step.matrix)):
            bound = dict(zip(step.matrix, values, strict=True))
            name = "-".join([base, *(f"{axis}{value}" for axis, value in bound.items())])
            document = _bind(raw, bound)
            named = frozenset(_references(document)) | frozenset(step.after)
            for other in sorted(named):
                if other not in config.steps:
                    raise ConfigError(f"no step {other!r}", where=where, fix=_near(other, config.steps, "steps"))
            drafts[name] = _Draft(name, base, step, kind, bound, document, document_where, named)
    return drafts


def _document(step: StepConfig, path: str, where: str) -> tuple[Document, str]:
    """The step's configuration with its differences, and what messages call it."""
    if isinstance(step.config, str):
        beside = Path(path).parent / step.config
        source = str(beside) if beside.is_file() else step.config
        document = configs.load(source)
        where = f"{source} (as {where} sets it)" if step.set else source
    else:
        document = step.config
    for key, value in step.set.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        document = configs.merge(document, nested)
    return document, where


def _order(drafts: Mapping[str, _Draft], by_base: Mapping[str, list[_Draft]], path: str) -> list[str]:
    """Names in an order in which each stands after what it needs, and otherwise as early as the file has it."""
    graph = {d.name: {o.name for base in d.named for o in _meant(d, base, by_base)} for d in drafts.values()}
    place = {name: number for number, name in enumerate(drafts)}
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ConfigError(
            f"steps wait for each other: {circle}", where=path, fix="remove one of the references"
        ) from None
    order: list[str] = []
    ready: list[tuple[int, str]] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, (place[name], name))
        _, name = heapq.heappop(ready)
        order.append(name)
        sorter.done(name)
    return order


def _meant(draft: _Draft, base: str, by_base: Mapping[str, list[_Draft]]) -> list[_Draft]:
    """The instances of step `base` that fit the draft's own matrix values."""
    return [
        other
        for other in by_base[base]
        if all(draft.values.get(axis, value) == value for axis, value in other.values.items())
    ]


def _resolve(
    draft: _Draft, by_base: Mapping[str, list[_Draft]], done: Mapping[str, ChainStep], folders: ChainFolders
) -> ChainStep:
    before = frozenset(other.name for base in draft.named for other in _meant(draft, base, by_base))
    config = draft.config
    document = draft.kind.complete(draft.name, _substitute(draft, draft.document, by_base, done), folders)
    # What is hashed, and in which order, is a format: records of finished steps hold the result.
    hashed = [
        config.kind,
        draft.document,
        config.ranks,
        config.machines,
        sorted(done[name].fingerprint for name in before),
    ]
    return ChainStep(
        name=draft.name,
        kind=config.kind,
        document=document,
        where=draft.where,
        output=draft.kind.output(draft.name, document, folders),
        after=before,
        fingerprint=hashlib.sha256(json.dumps(hashed, sort_keys=True, default=str).encode()).hexdigest()[:16],
        request=PlacementRequest(config.machines, config.ranks, config.cpus_per_rank),
    )


def _substitute(draft: _Draft, value: Any, by_base: Mapping[str, list[_Draft]], done: Mapping[str, ChainStep]) -> Any:
    """`value` with every reference replaced by the output it stands for."""
    if isinstance(value, Mapping):
        return {key: _substitute(draft, item, by_base, done) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_substitute(draft, item, by_base, done) for item in value]
    reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if reference is None:
        return value
    base, suffix = reference.group(1), reference.group(2) or ""
    urls = [done[other.name].output + suffix for other in _meant(draft, base, by_base)]
    return urls[0] if len(urls) == 1 else urls


def _references(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return set().union(*(_references(item) for item in value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*(_references(item) for item in value))
    reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return {reference.group(1)} if reference else set()


def _bind(value: Any, values: Mapping[str, Any]) -> Any:
    """`value` with "$axis" replaced by the axis' value, its type kept."""
    if isinstance(value, Mapping):
        return {key: _bind(item, values) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bind(item, values) for item in value]
    if isinstance(value, str) and value.startswith("$") and value[1:] in values:
        return values[value[1:]]
    return value


def _near(name: str, known: Iterable[str], what: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"add it to `{what}`, which has: {', '.join(known) or 'nothing'}"
