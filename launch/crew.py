"""The agents of one training job: one per node, placed by Ray, or a single one in this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from launch.agents import Agent, Group, Report
from pipeline.config import Document
from pipeline.errors import ResourceError

PLACEMENT_WAIT_S = 60.0
_CALL_TIMEOUT_S = 120.0
_POLL_TIMEOUT_S = 60.0


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


class AgentLostError(Exception):
    """An agent can't be reached: its node, or its process, has gone."""


class Crew(Protocol):
    """Agents that together run one group at a time."""

    def start(self, document: Document, where: str) -> None: ...

    def poll(self) -> list[Report]:
        """Raises AgentLostError."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def dismiss(self) -> None:
        """End whatever runs and give the resources back; may be called twice."""


class LocalCrew:
    """One agent in this process: no Ray."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._agent = Agent()

    def start(self, document: Document, where: str) -> None:
        _, port = self._agent.meeting_point()
        size = self._layout.world_size
        group = Group(document, where, size, "127.0.0.1", port, self._layout.cpus_per_worker, os.getcwd())
        self._agent.start(group, first_rank=0, num_ranks=size)

    def poll(self) -> list[Report]:
        return [self._agent.poll()]

    def terminate(self) -> None:
        self._agent.terminate()

    def kill(self) -> None:
        self._agent.kill()

    def dismiss(self) -> None:
        self._agent.kill()


class RayCrew:
    """One agent actor per node, strictly spread by a placement group; this process must be connected to Ray.

    The actors aren't detached: they end with this process, and the ranks end with them.

    Raises:
        ResourceError: the cluster can't hold the layout, or doesn't free enough in time.
    """

    def __init__(self, layout: Layout, *, wait_s: float = PLACEMENT_WAIT_S) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._ray = ray
        self._layout = layout
        self._agents: list[Any] = []
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        _check_feasible(layout, [_Node(n["NodeID"], n["Resources"]) for n in nodes if n["Alive"]])
        self._placement = placement_group([layout.bundle] * layout.nodes, strategy="STRICT_SPREAD")
        try:
            if not self._placement.wait(wait_s):
                free = ray.available_resources()  # type: ignore[no-untyped-call]
                raise ResourceError(
                    f"{_describe(layout)} didn't become free within {wait_s:.0f} s; free now: {_resources(free)}",
                    where="Ray cluster",
                    fix="wait for other jobs to end, or ask for fewer workers",
                )
            actor = ray.remote(Agent)
            for index in range(layout.nodes):
                strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=index)
                options = {"num_cpus": layout.bundle["CPU"], "num_gpus": layout.bundle.get("GPU", 0)}
                self._agents.append(actor.options(scheduling_strategy=strategy, max_restarts=0, **options).remote())
        except BaseException:
            self.dismiss()
            raise

    def start(self, document: Document, where: str) -> None:
        layout = self._layout
        address, port = self._call(self._agents[:1], "meeting_point", timeout_s=_CALL_TIMEOUT_S)[0]
        if layout.nodes == 1:
            address = "127.0.0.1"
        group = Group(document, where, layout.world_size, address, port, layout.cpus_per_worker, os.getcwd())
        per_node = layout.workers_per_node
        try:
            starting = [a.start.remote(group, i * per_node, per_node) for i, a in enumerate(self._agents)]
            self._ray.get(starting, timeout=_CALL_TIMEOUT_S)
        except self._ray.exceptions.RayError as error:
            raise AgentLostError(_brief(error)) from error

    def poll(self) -> list[Report]:
        reports: list[Report] = self._call(self._agents, "poll", timeout_s=_POLL_TIMEOUT_S)
        return reports

    def terminate(self) -> None:
        with contextlib.suppress(AgentLostError):
            self._call(self._agents, "terminate", timeout_s=_CALL_TIMEOUT_S)

    def kill(self) -> None:
        for agent in self._agents:
            with contextlib.suppress(AgentLostError):
                self._call([agent], "kill", timeout_s=_CALL_TIMEOUT_S)

    def dismiss(self) -> None:
        from ray.util.placement_group import remove_placement_group

        self.kill()
        for agent in self._agents:
            self._ray.kill(agent)
        self._agents = []
        placement, self._placement = self._placement, None
        if placement is not None:
            remove_placement_group(placement)

    def _call(self, agents: Sequence[Any], method: str, *, timeout_s: float) -> list[Any]:
        try:
            answers: list[Any] = self._ray.get([getattr(a, method).remote() for a in agents], timeout=timeout_s)
        except self._ray.exceptions.RayError as error:
            raise AgentLostError(_brief(error)) from error
        return answers


Hire = Callable[[], Crew]
"""Brings a new crew together; called anew for every attempt, since nodes may have come and gone."""


class _Node(NamedTuple):
    id: str
    resources: dict[str, float]


def _check_feasible(layout: Layout, nodes: Sequence[_Node]) -> None:
    """Refuse at once what the cluster could never hold: Ray itself would wait for ever."""
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
        f"{_describe(layout)} don't fit: missing {'; '.join(shortfall)}",
        where=f"Ray cluster of {len(nodes)} node(s)",
        fix="ask for fewer workers, or fewer cores each, or add nodes",
    )


def _describe(layout: Layout) -> str:
    gpus = f" and {layout.gpus_per_worker} GPU(s)" if layout.gpus_per_worker else ""
    return (
        f"{layout.world_size} worker(s) on {layout.nodes} node(s), each with {layout.cpus_per_worker} core(s){gpus},"
    ).rstrip(",")


def _resources(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")) or "nothing"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
