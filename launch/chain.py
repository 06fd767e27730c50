"""A chain: a graph of stages, with data preparation and the report as nodes too, read from one YAML file.

    nodes:
      pairs: {kind: prep, config: configs/prep/pairs.yaml}
      mae:   {kind: train, config: configs/pretrain/mae.yaml, workers: 2, set: {data.train: "@pairs/train"}}

A string "@node" or "@node/suffix" stands for the other node's output (a data set folder, a run directory) and puts
this node after it. With `matrix: {seed: [0, 1, 2]}` at the top, a node that lists `matrix: [seed]` is run once per
value, as `node-seed0` and so on; "$seed" is the value, "@node" of such a node means the one with the same values, and
a list of all of them where the reader isn't in the matrix itself.

This module reads and checks; `launch.conductor` runs.
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
from typing import Any, Literal, NamedTuple

from pydantic import Field, PositiveInt

from pipeline import config as configs
from pipeline import storage
from pipeline.config import Config, Document
from pipeline.errors import ConfigError

Kind = Literal["scenes", "prep", "train", "report"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(r"@([A-Za-z0-9][A-Za-z0-9_-]*)(/.*)?")


class NodeConfig(Config):
    """One node of a chain as its file gives it."""

    kind: Kind
    config: str | dict[str, Any] = {}  # a YAML file, or the document itself
    set: dict[str, Any] = {}  # differences; keys may be dotted
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """Ranks on each node; [min, max] over all nodes, elastic; None: one per GPU, else one per core."""
    nodes: int = Field(default=1, gt=0)  # machines
    cpus_per_worker: int | None = Field(default=None, gt=0)  # None: the cores are shared out among the workers
    matrix: tuple[str, ...] = ()  # axes this node is repeated over
    after: tuple[str, ...] = ()  # nodes that must have finished, beside those referred to


class ChainConfig(Config):
    """A chain as its file gives it."""

    nodes: dict[str, dict[str, Any]] = Field(min_length=1)  # each a NodeConfig
    matrix: dict[str, tuple[int | float | str, ...]] = {}
    work: str | None = None  # folder for runs, logs and what is finished; None: runs/<name of the file>
    store: str | None = None  # folder or s3:// prefix for data and checkpoints; None: <work>/store


class Places(NamedTuple):
    """Where a chain keeps things."""

    work: Path
    store: str

    def output(self, kind: Kind, name: str) -> str:
        """What "@name" stands for."""
        if kind == "train":
            return str(self.work / "runs" / name)
        if kind == "report":
            return str(self.work / name)
        return storage.join(self.store, "raw" if kind == "scenes" else "data", name)


class Node(NamedTuple):
    """One node ready to be run: matrix expanded, references resolved."""

    name: str
    kind: Kind
    document: Document
    where: str
    output: str
    after: frozenset[str]
    fingerprint: str  # of the configuration as written and those of all nodes before; not of places
    workers: int | tuple[int, int] | None
    nodes: int
    cpus_per_worker: int | None


class Chain(NamedTuple):
    """The nodes in an order in which they could run."""

    nodes: dict[str, Node]
    places: Places
    where: str

    def downstream(self, names: Iterable[str]) -> set[str]:
        """The nodes named and all that build on them."""
        affected = set(names)
        for node in self.nodes.values():
            if node.after & affected:
                affected.add(node.name)
        return affected


class _Draft(NamedTuple):
    """A node with its matrix values bound, references still open."""

    name: str
    base: str  # name in the file
    config: NodeConfig
    values: dict[str, Any]
    document: Document
    where: str
    named: frozenset[str]  # nodes referred to, as in the file


def load_chain(path: str, overrides: Sequence[str] = (), *, work: str | None = None, store: str | None = None) -> Chain:
    """Read and check a chain.

    Args:
        path: its YAML file, or a shipped one.
        overrides: "a.b=c" changes to the file, e.g. "nodes.mae.set.length_samples=1000".
        work, store: override the file's.

    Raises:
        ConfigError: anything in it, or in a file it names, that is wrong: a cycle, an unknown node, a misspelt key.
    """
    config = configs.validate(ChainConfig, configs.load(path, overrides), where=path)
    work_folder = Path(work or config.work or f"runs/{Path(path).stem}")
    places = Places(work_folder, (store or config.store or str(work_folder / "store")).rstrip("/"))
    drafts = _expand(config, path)
    by_base: dict[str, list[_Draft]] = {}
    for draft in drafts.values():
        by_base.setdefault(draft.base, []).append(draft)
    order = _order(drafts, by_base, path)
    nodes: dict[str, Node] = {}
    for name in order:
        nodes[name] = _resolve(drafts[name], by_base, nodes, places)
    return Chain(nodes, places, path)


def _expand(config: ChainConfig, path: str) -> dict[str, _Draft]:
    drafts: dict[str, _Draft] = {}
    for base, written in config.nodes.items():
        node = configs.validate(NodeConfig, written, where=path, prefix=f"nodes.{base}")
        where = f"{path}: nodes.{base}"
        if not _NAME.fullmatch(base):
            raise ConfigError("no valid node name", where=where, fix="use letters, digits, '-' and '_'")
        for axis in node.matrix:
            if axis not in config.matrix:
                raise ConfigError(
                    f"no axis {axis!r}", where=f"{where}.matrix", fix=_near(axis, config.matrix, "matrix")
                )
        raw, document_where = _document(node, path, where)
        for values in itertools.product(*(config.matrix[axis] for axis in node.matrix)):
            bound = dict(zip(node.matrix, values, strict=True))
            name = "-".join([base, *(f"{axis}{value}" for axis, value in bound.items())])
            document = _bind(raw, bound)
            named = frozenset(_references(document)) | frozenset(node.after)
            for other in sorted(named):
                if other not in config.nodes:
                    raise ConfigError(f"no node {other!r}", where=where, fix=_near(other, config.nodes, "nodes"))
            drafts[name] = _Draft(name, base, node, bound, document, document_where, named)
    return drafts


def _document(node: NodeConfig, path: str, where: str) -> tuple[Document, str]:
    """The node's configuration with its differences, and what messages call it."""
    if isinstance(node.config, str):
        beside = Path(path).parent / node.config
        source = str(beside) if beside.is_file() else node.config
        document = configs.load(source)
        where = f"{source} (as {where} sets it)" if node.set else source
    else:
        document = node.config
    for key, value in node.set.items():
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
            f"nodes wait for each other: {circle}", where=path, fix="remove one of the references"
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
    """The instances of node `base` that fit the draft's own matrix values."""
    return [
        other
        for other in by_base[base]
        if all(draft.values.get(axis, value) == value for axis, value in other.values.items())
    ]


def _resolve(draft: _Draft, by_base: Mapping[str, list[_Draft]], done: Mapping[str, Node], places: Places) -> Node:
    kind = draft.config.kind
    output = places.output(kind, draft.name)
    document = _with_outputs(kind, draft.name, _substitute(draft, draft.document, by_base, done), places)
    before = frozenset(other.name for base in draft.named for other in _meant(draft, base, by_base))
    config = draft.config
    told = [kind, draft.document, config.workers, config.nodes, sorted(done[name].fingerprint for name in before)]
    return Node(
        name=draft.name,
        kind=kind,
        document=document,
        where=draft.where,
        output=str(document["output"]) if kind == "prep" else output,
        after=before,
        fingerprint=hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16],
        workers=config.workers,
        nodes=config.nodes,
        cpus_per_worker=config.cpus_per_worker,
    )


def _with_outputs(kind: Kind, name: str, document: Document, places: Places) -> Document:
    """Fill in where the node writes, unless its configuration says so itself."""
    if kind == "prep":
        return configs.merge({"output": places.output(kind, name)}, document)
    if kind == "train":
        defaults: Document = {"name": name, "runs": str(places.work / "runs")}
        if storage.is_remote(places.store):
            defaults["checkpoint"] = {"url": storage.join(places.store, "checkpoints", name)}
        return {**configs.merge(defaults, document), "name": name, "runs": defaults["runs"]}
    return document


def _substitute(draft: _Draft, value: Any, by_base: Mapping[str, list[_Draft]], done: Mapping[str, Node]) -> Any:
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
