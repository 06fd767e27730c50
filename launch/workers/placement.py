"""How many ranks a training job has on how many machines, and whether a cluster can hold them.

One rule serves every way to start a job (`placement_for`): what isn't asked for follows from what one machine offers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.errors import ConfigError, ResourceError
from pipeline.machine import Machine


class RankPlacement(NamedTuple):
    """How many ranks a job has, and what each takes."""

    machines: int
    ranks_per_machine: int
    cpus_per_rank: int = 1
    gpus_per_rank: int = 0

    @property
    def world_size(self) -> int:
        return self.machines * self.ranks_per_machine

    @property
    def bundle(self) -> dict[str, float]:
        """What each machine has to offer."""
        needs = {"CPU": float(self.ranks_per_machine * self.cpus_per_rank)}
        if self.gpus_per_rank:
            needs["GPU"] = float(self.ranks_per_machine * self.gpus_per_rank)
        return needs


class ElasticPlacement(NamedTuple):
    """A job that takes what there is: between `minimum` and `maximum` ranks over all machines, equally many on each
    machine it uses, and as many as divide the global batch.
    """

    minimum: int
    maximum: int
    global_batch: int
    cpus_per_rank: int = 1
    gpus_per_rank: int = 0


class PlacementRequest(NamedTuple):
    """What a user asks for; None is left to the rule of `placement_for`."""

    machines: int = 1
    ranks: int | tuple[int, int] | None = None  # on each machine; (minimum, maximum): over all machines, elastic
    cpus_per_rank: int | None = None


def placement_for(
    request: PlacementRequest, offered: Sequence[Machine], global_batch: int
) -> RankPlacement | ElasticPlacement:
    """The placement a request comes to on these machines.

    A job on several machines has equally many ranks on each, so the weakest of the machines it will use decides: of
    those offered, the ones with most GPUs, then most cores. By default there is a rank for each GPU of a machine, or
    one rank where there are no GPUs, and a machine's cores are shared out equally among its ranks. Elastic jobs take a
    GPU for each rank where there are any, and that GPU's share of the cores, else one core.

    Args:
        offered: every usable machine with all it has, whether taken at the moment or not.
        global_batch: of the job, which an elastic job's ranks must divide.
    """
    best = sorted(offered, key=lambda machine: (_amount(machine, "GPU"), _amount(machine, "CPU")), reverse=True)
    if isinstance(request.ranks, tuple):
        with_gpus = [machine for machine in best if _amount(machine, "GPU")]
        share = min((_amount(machine, "CPU") // _amount(machine, "GPU") for machine in with_gpus), default=1)
        cpus = request.cpus_per_rank or max(1, share)
        return ElasticPlacement(*request.ranks, global_batch, cpus, 1 if with_gpus else 0)
    used = best[: request.machines]
    gpus = min((_amount(machine, "GPU") for machine in used), default=0)
    cores = min((_amount(machine, "CPU") for machine in used), default=1)
    ranks = request.ranks or gpus or 1
    return RankPlacement(request.machines, ranks, request.cpus_per_rank or max(1, cores // ranks), 1 if gpus else 0)


def _amount(machine: Machine, kind: str) -> int:
    return int(machine.resources.get(kind, 0))


def parse_ranks(text: str) -> int | tuple[int, int]:
    """The `--ranks` option: "4" on each machine, or "2:8" over all machines, elastic.

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
        f"{text!r} is no number of ranks", where="--ranks", fix="give a number, or MIN:MAX for an elastic job"
    )


def fit(wanted: ElasticPlacement, machines: Sequence[Machine]) -> RankPlacement | None:
    """The largest world the machines hold now, on as few of them as do; None where it would be below the minimum."""
    room = sorted((_room(wanted, machine) for machine in machines), reverse=True)
    best: RankPlacement | None = None
    for count, most in enumerate(room, start=1):
        for per_machine in range(1, most + 1):
            size = count * per_machine
            allowed = wanted.minimum <= size <= wanted.maximum and wanted.global_batch % size == 0
            if allowed and (best is None or size > best.world_size):
                best = RankPlacement(count, per_machine, wanted.cpus_per_rank, wanted.gpus_per_rank)
    return best


def check_fits(wanted: ElasticPlacement, machines: Sequence[Machine]) -> RankPlacement:
    """`fit`, or what is missing.

    Raises:
        ConfigError: no number of ranks in the range divides the global batch.
        ResourceError: the machines can't hold the minimum.
    """
    placement = fit(wanted, machines)
    if placement is not None:
        return placement
    room = sum(_room(wanted, machine) for machine in machines)
    sizes = [n for n in range(wanted.minimum, wanted.maximum + 1) if wanted.global_batch % n == 0]
    if not sizes:
        raise ConfigError(
            f"no world of {wanted.minimum} to {wanted.maximum} ranks divides the global batch of {wanted.global_batch}",
            where="ranks",
            fix="widen the range, or change data.global_batch",
        )
    raise ResourceError(
        f"at least {sizes[0]} rank(s) with {_each(wanted.cpus_per_rank, wanted.gpus_per_rank)} are wanted, and there "
        f"is room for {room} (worlds that divide the global batch: {', '.join(map(str, sizes))})",
        where=f"Ray cluster of {len(machines)} machine(s)",
        fix="add machines, or lower the minimum",
    )


def check_feasible(placement: RankPlacement, machines: Sequence[Machine]) -> None:
    """Refuse at once what the cluster could never hold: Ray itself would wait for ever.

    Raises:
        ResourceError: with the resources that are missing.
    """
    fitting = [m for m in machines if all(m.resources.get(kind, 0) >= n for kind, n in placement.bundle.items())]
    if len(fitting) >= placement.machines:
        return
    shortfall = []
    for kind, needed in placement.bundle.items():
        most = max((machine.resources.get(kind, 0) for machine in machines), default=0)
        if most < needed:
            shortfall.append(f"{needed:g} {kind} on one machine, of which the largest has {most:g}")
    if len(machines) < placement.machines:
        shortfall.append(f"{placement.machines} machines, of which there are {len(machines)}")
    if not shortfall:
        shortfall.append(f"{placement.machines} machines that fit, of which there are {len(fitting)}")
    raise ResourceError(
        f"{describe_placement(placement)} don't fit: missing {'; '.join(shortfall)}",
        where=f"Ray cluster of {len(machines)} machine(s)",
        fix="ask for fewer ranks, or fewer cores each, or add machines",
    )


def describe_placement(placement: RankPlacement) -> str:
    """In words."""
    each = _each(placement.cpus_per_rank, placement.gpus_per_rank)
    return f"{placement.world_size} rank(s) on {placement.machines} machine(s), each rank with {each}"


def without(machines: Iterable[Machine], excluded: Iterable[str]) -> list[Machine]:
    """The machines that aren't named in `excluded`, by Ray's id (or its beginning) or address."""
    names = [name for name in excluded if name]
    return [m for m in machines if not any(m.id.startswith(name) or m.address == name for name in names)]


def _room(wanted: ElasticPlacement, machine: Machine) -> int:
    """Ranks that a machine has room for."""
    room = int(machine.resources.get("CPU", 0) // wanted.cpus_per_rank)
    if wanted.gpus_per_rank:
        room = min(room, int(machine.resources.get("GPU", 0) // wanted.gpus_per_rank))
    return room


def _each(cpus: int, gpus: int) -> str:
    return f"{cpus} core(s)" + (f" and {gpus} GPU(s)" if gpus else "")
