"""The processes of one attempt at a training job: ranks on machines that Ray places, or all on this machine."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from launch.workers.agent import Agent, AgentReport, JobSpec
from launch.workers.placement import (
    ElasticPlacement,
    PlacementRequest,
    RankPlacement,
    check_feasible,
    check_fits,
    describe_placement,
    fit,
    placement_for,
    without,
)
from pipeline import ray_cluster
from pipeline.config import Document
from pipeline.errors import ResourceError
from pipeline.machine import Machine

PLACEMENT_WAIT_S = 60.0
SETTLE_S = 5.0  # for Ray to give back what an ended job held, before an elastic one takes less than it might
CHECK_S = 5.0  # between checks of whether the cluster has changed
_CALL_TIMEOUT_S = 120.0
_POLL_TIMEOUT_S = 60.0


class AgentLostError(Exception):
    """An agent can't be reached: its machine, or its process, is gone."""


class WorkerGroup(Protocol):
    """The ranks of one attempt, started and watched by an agent on each machine."""

    def start(self, document: Document, where: str) -> None: ...

    def poll(self) -> list[AgentReport]:
        """Raises AgentLostError."""

    def terminate(self) -> None: ...

    def dump_stacks(self) -> None: ...

    def kill(self) -> None: ...

    def reason_to_move(self) -> str:
        """Why the ranks should save and start anew on other machines; "" while they are well placed."""

    def machine_of(self, rank: int) -> str:
        """Id of the machine a rank runs on; "" where there is only one."""

    def release(self) -> None:
        """End whatever runs and give the resources back; may be called twice."""


class LocalWorkerGroup:
    """One agent in this process: no Ray."""

    def __init__(self, placement: RankPlacement) -> None:
        self._placement = placement
        self._agent = Agent()

    def start(self, document: Document, where: str) -> None:
        _, port = self._agent.rendezvous()
        size = self._placement.world_size
        job = JobSpec(document, where, size, "127.0.0.1", port, self._placement.cpus_per_rank, os.getcwd())
        self._agent.start(job, first_rank=0, num_ranks=size)

    def poll(self) -> list[AgentReport]:
        return [self._agent.poll()]

    def terminate(self) -> None:
        self._agent.terminate()

    def dump_stacks(self) -> None:
        self._agent.dump_stacks()

    def kill(self) -> None:
        self._agent.kill()

    def reason_to_move(self) -> str:
        return ""

    def machine_of(self, rank: int) -> str:
        return ""

    def release(self) -> None:
        self._agent.kill()


class RayWorkerGroup:
    """One agent actor per machine, strictly spread by a placement group; this process must be connected to Ray.

    The actors aren't detached: they end with this process, and the ranks end with them.

    Args:
        wanted: a fixed placement, or an elastic one that takes what is free now.
        excluded: machines not to use, by id (or its beginning) or address.

    Raises:
        ResourceError: the cluster can't hold the placement, or doesn't free enough in time.
    """

    def __init__(
        self,
        wanted: RankPlacement | ElasticPlacement,
        *,
        excluded: Sequence[str] = (),
        wait_s: float = PLACEMENT_WAIT_S,
    ) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._ray = ray
        self._wanted = wanted
        self._excluded = tuple(excluded)
        self._agents: list[Any] = []
        self._machine_ids: list[str] = []
        self._checks_with_room = 0
        self._checked_at = time.monotonic()
        if isinstance(wanted, ElasticPlacement):
            self._placement = placement = self._largest_free(wanted)
        else:
            self._placement = placement = wanted
            check_feasible(placement, self._usable(ray_cluster.machines()))
        usable = {machine.id for machine in self._usable(ray_cluster.machines())}
        refused = [machine.id for machine in ray_cluster.machines() if machine.id not in usable]
        selector = {"ray.io/node-id": f"!in({','.join(refused)})"} if refused else {}
        self._bundles = placement_group(
            [placement.bundle] * placement.machines,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[selector] * placement.machines if selector else None,
        )
        try:
            if not self._bundles.wait(wait_s):
                free = ray.available_resources()  # type: ignore[no-untyped-call]
                raise ResourceError(
                    f"{describe_placement(placement)} didn't become free within {wait_s:.0f} s; free now: "
                    f"{_resources(free)}",
                    where="Ray cluster",
                    fix="wait for other jobs to end, or ask for fewer ranks",
                )
            actor = ray.remote(Agent)
            for index in range(placement.machines):
                strategy = PlacementGroupSchedulingStrategy(self._bundles, placement_group_bundle_index=index)
                options = {"num_cpus": placement.bundle["CPU"], "num_gpus": placement.bundle.get("GPU", 0)}
                self._agents.append(actor.options(scheduling_strategy=strategy, max_restarts=0, **options).remote())
            self._machine_ids = self._call(self._agents, "node_id", timeout_s=_CALL_TIMEOUT_S)
        except AgentLostError as error:
            self.release()
            raise ResourceError(
                f"an agent didn't start ({error})", where="Ray cluster", fix="see Ray's logs on its machines"
            ) from error
        except BaseException:
            self.release()
            raise

    def start(self, document: Document, where: str) -> None:
        placement = self._placement
        address, port = self._call(self._agents[:1], "rendezvous", timeout_s=_CALL_TIMEOUT_S)[0]
        if placement.machines == 1:
            address = "127.0.0.1"
        job = JobSpec(document, where, placement.world_size, address, port, placement.cpus_per_rank, os.getcwd())
        each = placement.ranks_per_machine
        try:
            starting = [a.start.remote(job, i * each, each) for i, a in enumerate(self._agents)]
            self._ray.get(starting, timeout=_CALL_TIMEOUT_S)
        except self._ray.exceptions.RayError as error:
            raise AgentLostError(_brief(error)) from error

    def poll(self) -> list[AgentReport]:
        reports: list[AgentReport] = self._call(self._agents, "poll", timeout_s=_POLL_TIMEOUT_S)
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

    def reason_to_move(self) -> str:
        """A machine of ours is being drained, or an elastic job could be larger for two checks in a row."""
        now = time.monotonic()
        if now - self._checked_at < CHECK_S:
            return ""
        self._checked_at = now
        leaving = set(ray_cluster.draining()) & set(self._machine_ids)
        if leaving:
            return f"machine {min(leaving)[:12]} is being drained"
        if not isinstance(self._wanted, ElasticPlacement):
            return ""
        possible = fit(
            self._wanted, [self._with_ours(machine) for machine in self._usable(ray_cluster.free_machines())]
        )
        if possible is None or possible.world_size <= self._placement.world_size:
            self._checks_with_room = 0
            return ""
        self._checks_with_room += 1
        if self._checks_with_room < 2:
            return ""
        return f"there is room for {possible.world_size} ranks instead of {self._placement.world_size}"

    @property
    def placement(self) -> RankPlacement:
        """What the group's ranks take."""
        return self._placement

    def machine_of(self, rank: int) -> str:
        number = rank // self._placement.ranks_per_machine
        return self._machine_ids[number] if self._placement.machines > 1 and number < len(self._machine_ids) else ""

    def _largest_free(self, wanted: ElasticPlacement) -> RankPlacement:
        """The largest placement that is free, after waiting a little for what ended jobs are still giving back."""
        deadline = time.monotonic() + SETTLE_S
        largest = fit(wanted, self._usable(ray_cluster.machines()))
        while True:
            free = self._usable(ray_cluster.free_machines())
            placement = fit(wanted, free)
            if placement == largest or time.monotonic() > deadline:
                return check_fits(wanted, free)
            time.sleep(0.2)

    def _usable(self, machines: Sequence[Machine]) -> list[Machine]:
        leaving = set(ray_cluster.draining())
        return [machine for machine in without(machines, self._excluded) if machine.id not in leaving]

    def _with_ours(self, machine: Machine) -> Machine:
        """What would be free on a machine if this group released what it holds there."""
        held = self._placement.bundle if machine.id in self._machine_ids else {}
        return machine._replace(
            resources=machine.resources | {kind: machine.resources.get(kind, 0.0) + n for kind, n in held.items()}
        )

    def release(self) -> None:
        from ray.util.placement_group import remove_placement_group

        self.kill()
        for agent in self._agents:
            self._ray.kill(agent)
        self._agents = []
        bundles, self._bundles = self._bundles, None
        if bundles is not None:
            remove_placement_group(bundles)

    def _call(self, agents: Sequence[Any], method: str, *, timeout_s: float) -> list[Any]:
        try:
            answers: list[Any] = self._ray.get([getattr(a, method).remote() for a in agents], timeout=timeout_s)
        except self._ray.exceptions.RayError as error:
            raise AgentLostError(_brief(error)) from error
        return answers


Allocate = Callable[[Sequence[str]], WorkerGroup]
"""Brings a new group together, without the machines named; called for every attempt, since machines come and go."""


def allocator(request: PlacementRequest, global_batch: int, *, excluded: Sequence[str] = ()) -> Allocate:
    """Allocates groups on the Ray that this process is connected to, all of one placement.

    Args:
        excluded: machines not to use, by id (or its beginning) or address.
    """
    wanted = placement_for(request, without(ray_cluster.machines(), excluded), global_batch)

    def allocate(also_excluded: Sequence[str]) -> WorkerGroup:
        return RayWorkerGroup(wanted, excluded=[*excluded, *also_excluded])

    return allocate


def _resources(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")) or "nothing"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
