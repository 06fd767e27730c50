"""How many processes a training job has on how many nodes, and whether a cluster can hold them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.errors import ConfigError, ResourceError


class Layout(NamedTuple):
    """How many processes a job has, and what each takes."""

    nodes: int
    workers_per_node: int
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0

    @property
    def world_size(self) -> int:
        return self.nodes * self.workers_per_node

    @property
    def bundle(self) -> dict[str, float]:
        """What one node has to offer."""
        needs = {"CPU": float(self.workers_per_node * self.cpus_per_worker)}
        if self.gpus_per_worker:
            needs["GPU"] = float(self.workers_per_node * self.gpus_per_worker)
        return needs


class Elastic(NamedTuple):
    """A job that takes what there is: between `minimum` and `maximum` processes over all nodes, equally many on each
    node it uses, and as many as divide the global batch.
    """

    minimum: int
    maximum: int
    global_batch: int
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0


class NodeFacts(NamedTuple):
    """A node of a cluster and what it offers."""

    id: str
    resources: dict[str, float]
    address: str = ""


def parse_workers(text: str) -> int | tuple[int, int]:
    """The `--workers` option: "4" on each node, or "2:8" over all nodes, elastic.

    Raises:
        ConfigError: it is neither.
    """
    low, colon, high = text.partition(":")
    if low.isdigit() and (high.isdigit() or not colon) and int(low) > 0:
        if not colon:
            return int(low)
        if int(high) >= int(low):
            return int(low), int(high)
    raise ConfigError(
        f"{text!r} is no number of workers", where="--workers", fix="give a number, or MIN:MAX for an elastic job"
    )


def fit(wanted: Elastic, nodes: Sequence[NodeFacts]) -> Layout | None:
    """The largest world the nodes hold now, on as few of them as do; None where it would be below the minimum."""
    slots = sorted((_slots(wanted, node) for node in nodes), reverse=True)
    best: Layout | None = None
    for count, per_node_max in enumerate(slots, start=1):
        for per_node in range(1, per_node_max + 1):
            size = count * per_node
            allowed = wanted.minimum <= size <= wanted.maximum and wanted.global_batch % size == 0
            if allowed and (best is None or size > best.world_size):
                best = Layout(count, per_node, wanted.cpus_per_worker, wanted.gpus_per_worker)
    return best


def check_fits(wanted: Elastic, nodes: Sequence[NodeFacts]) -> Layout:
    """`fit`, or what is missing.

    Raises:
        ResourceError: the nodes can't hold the minimum.
    """
    layout = fit(wanted, nodes)
    if layout is not None:
        return layout
    held = sum(_slots(wanted, node) for node in nodes)
    sizes = [n for n in range(wanted.minimum, wanted.maximum + 1) if wanted.global_batch % n == 0]
    if not sizes:
        raise ConfigError(
            f"no world of {wanted.minimum} to {wanted.maximum} workers divides the global batch of "
            f"{wanted.global_batch}",
            where="workers",
            fix="widen the range, or change data.global_batch",
        )
    raise ResourceError(
        f"at least {sizes[0]} worker(s) with {_each(wanted.cpus_per_worker, wanted.gpus_per_worker)} are wanted, and "
        f"there is room for {held} (worlds that divide the global batch: {', '.join(map(str, sizes))})",
        where=f"Ray cluster of {len(nodes)} node(s)",
        fix="add nodes, or lower the minimum",
    )


def check_feasible(layout: Layout, nodes: Sequence[NodeFacts]) -> None:
    """Refuse at once what the cluster could never hold: Ray itself would wait for ever.

    Raises:
        ResourceError: with the resources that are missing.
    """
    fitting = [n for n in nodes if all(n.resources.get(k, 0) >= v for k, v in layout.bundle.items())]
    if len(fitting) >= layout.nodes:
        return
    shortfall = []
    for kind, needed in layout.bundle.items():
        most = max((n.resources.get(kind, 0) for n in nodes), default=0)
        if most < needed:
            shortfall.append(f"{needed:g} {kind} on one node, of which the largest has {most:g}")
    if len(nodes) < layout.nodes:
        shortfall.append(f"{layout.nodes} nodes, of which there are {len(nodes)}")
    if not shortfall:
        shortfall.append(f"{layout.nodes} nodes that fit, of which there are {len(fitting)}")
    raise ResourceError(
        f"{describe_layout(layout)} don't fit: missing {'; '.join(shortfall)}",
        where=f"Ray cluster of {len(nodes)} node(s)",
        fix="ask for fewer workers, or fewer cores each, or add nodes",
    )


def describe_layout(layout: Layout) -> str:
    """In words."""
    each = _each(layout.cpus_per_worker, layout.gpus_per_worker)
    return f"{layout.world_size} worker(s) on {layout.nodes} node(s), each with {each}"


def without(nodes: Iterable[NodeFacts], excluded: Iterable[str]) -> list[NodeFacts]:
    """The nodes that aren't named in `excluded`, by id (or its beginning) or address."""
    named = [name for name in excluded if name]
    return [n for n in nodes if not any(n.id.startswith(name) or n.address == name for name in named)]


def _slots(wanted: Elastic, node: NodeFacts) -> int:
    slots = int(node.resources.get("CPU", 0) // wanted.cpus_per_worker)
    if wanted.gpus_per_worker:
        slots = min(slots, int(node.resources.get("GPU", 0) // wanted.gpus_per_worker))
    return slots


def _each(cpus: int, gpus: int) -> str:
    return f"{cpus} core(s)" + (f" and {gpus} GPU(s)" if gpus else "")
