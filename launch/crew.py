"""The agents of one training job: one per node, placed by Ray, or a single one in this process."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from launch.agents import Agent, Group, Report
from launch.layout import Elastic, Layout, NodeFacts, check_feasible, check_fits, describe_layout, fit, without
from pipeline.config import Document
from pipeline.errors import ResourceError

PLACEMENT_WAIT_S = 60.0
LOOK_S = 5.0  # between looks at whether the cluster has changed
_CALL_TIMEOUT_S = 120.0
_POLL_TIMEOUT_S = 60.0


class AgentLostError(Exception):
    """An agent can't be reached: its node, or its process, has gone."""


class Crew(Protocol):
    """Agents that together run one group at a time."""

    def start(self, document: Document, where: str) -> None: ...

    def poll(self) -> list[Report]:
        """Raises AgentLostError."""

    def terminate(self) -> None: ...

    def dump_stacks(self) -> None: ...

    def kill(self) -> None: ...

    def wants_change(self) -> str:
        """Why the group should be saved and started anew on other nodes; "" while it is well placed."""

    def node_of(self, rank: int) -> str:
        """Id of the node a rank runs on; "" where there is only one."""

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

    def dump_stacks(self) -> None:
        self._agent.dump_stacks()

    def kill(self) -> None:
        self._agent.kill()

    def wants_change(self) -> str:
        return ""

    def node_of(self, rank: int) -> str:
        return ""

    def dismiss(self) -> None:
        self._agent.kill()


class RayCrew:
    """One agent actor per node, strictly spread by a placement group; this process must be connected to Ray.

    The actors aren't detached: they end with this process, and the ranks end with them.

    Args:
        wanted: a fixed layout, or an elastic job that takes what is free now.
        excluded: nodes not to use, by id (or its beginning) or address.

    Raises:
        ResourceError: the cluster can't hold the layout, or doesn't free enough in time.
    """

    def __init__(
        self, wanted: Layout | Elastic, *, excluded: Sequence[str] = (), wait_s: float = PLACEMENT_WAIT_S
    ) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._ray = ray
        self._wanted = wanted
        self._excluded = tuple(excluded)
        self._agents: list[Any] = []
        self._node_ids: list[str] = []
        self._change_seen = 0
        self._looked_at = time.monotonic()
        if isinstance(wanted, Elastic):
            self._layout = layout = check_fits(wanted, self._usable(_free_now()))
        else:
            self._layout = layout = wanted
            check_feasible(layout, self._usable(_totals()))
        refused = [n.id for n in _totals() if n not in self._usable(_totals())]
        selector = {"ray.io/node-id": f"!in({','.join(refused)})"} if refused else {}
        self._placement = placement_group(
            [layout.bundle] * layout.nodes,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[selector] * layout.nodes if selector else None,
        )
        try:
            if not self._placement.wait(wait_s):
                free = ray.available_resources()  # type: ignore[no-untyped-call]
                raise ResourceError(
                    f"{describe_layout(layout)} didn't become free within {wait_s:.0f} s; free now: {_resources(free)}",
                    where="Ray cluster",
                    fix="wait for other jobs to end, or ask for fewer workers",
                )
            actor = ray.remote(Agent)
            for index in range(layout.nodes):
                strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=index)
                options = {"num_cpus": layout.bundle["CPU"], "num_gpus": layout.bundle.get("GPU", 0)}
                self._agents.append(actor.options(scheduling_strategy=strategy, max_restarts=0, **options).remote())
            self._node_ids = self._call(self._agents, "node_id", timeout_s=_CALL_TIMEOUT_S)
        except AgentLostError as error:
            self.dismiss()
            raise ResourceError(
                f"an agent didn't start ({error})", where="Ray cluster", fix="see Ray's logs on its nodes"
            ) from error
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

    def dump_stacks(self) -> None:
        with contextlib.suppress(AgentLostError):
            self._call(self._agents, "dump_stacks", timeout_s=_CALL_TIMEOUT_S)

    def kill(self) -> None:
        for agent in self._agents:
            with contextlib.suppress(AgentLostError):
                self._call([agent], "kill", timeout_s=_CALL_TIMEOUT_S)

    def wants_change(self) -> str:
        """A node of ours is being drained, or an elastic job could be larger for two looks in a row."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return ""
        self._looked_at = now
        leaving = set(_draining()) & set(self._node_ids)
        if leaving:
            return f"node {min(leaving)[:12]} is being drained"
        if not isinstance(self._wanted, Elastic):
            return ""
        free = []
        for node in self._usable(_free_now()):
            own = self._layout.bundle if node.id in self._node_ids else {}
            free.append(node._replace(resources={k: v + own.get(k, 0) for k, v in _with(node, own).items()}))
        possible = fit(self._wanted, free)
        if possible is None or possible.world_size <= self._layout.world_size:
            self._change_seen = 0
            return ""
        self._change_seen += 1
        if self._change_seen < 2:
            return ""
        return f"there is room for {possible.world_size} workers instead of {self._layout.world_size}"

    def node_of(self, rank: int) -> str:
        number = rank // self._layout.workers_per_node
        return self._node_ids[number] if self._layout.nodes > 1 and number < len(self._node_ids) else ""

    def _usable(self, nodes: Sequence[NodeFacts]) -> list[NodeFacts]:
        leaving = set(_draining())
        return [node for node in without(nodes, self._excluded) if node.id not in leaving]

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


Hire = Callable[[Sequence[str]], Crew]
"""Brings a new crew together, without the nodes named; called anew for every attempt, since nodes come and go."""


def _totals() -> list[NodeFacts]:
    """Every node that is alive, with all it has."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [NodeFacts(n["NodeID"], n["Resources"], n["NodeManagerAddress"]) for n in nodes if n["Alive"]]


def _free_now() -> list[NodeFacts]:
    """Every node that is alive, with what isn't taken."""
    from ray._private import state  # the public call gives the sum over nodes only

    free = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return [node._replace(resources=dict(free.get(node.id, {}))) for node in _totals()]


def _draining() -> list[str]:
    """Ids of nodes that are about to leave."""
    from ray._private import state

    return list(state.state.get_draining_nodes())


def _with(node: NodeFacts, own: dict[str, float]) -> dict[str, float]:
    return {**dict.fromkeys(own, 0.0), **node.resources}


def _resources(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")) or "nothing"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
