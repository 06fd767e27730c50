"""The ranks of one training job, and how they communicate.

Everything works without a process group too, as a world of one rank, so that callers need no second code path. All
functions but `world`, `local_size` and `device` are collective: every rank calls them, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

T = TypeVar("T")


class World(NamedTuple):
    """A rank's number, the number of ranks, and the rank's number on its own machine."""

    rank: int
    size: int
    local_rank: int


def world() -> World:
    """The rank of this process; (0, 1, 0) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 1, 0)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def local_size() -> int:
    """Ranks of this job on this machine, from the launcher's environment variables."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))))


def device() -> torch.device:
    """The device this rank computes and communicates on."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "") != "cpu":
        return torch.device("cuda", world().local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def barrier() -> None:
    """Wait for every rank."""
    if world().size > 1:
        dist.barrier()


def broadcast(obj: T, source: int = 0) -> T:
    """The source rank's object, on every rank (pickled)."""
    if world().size == 1:
        return obj
    box: list[Any] = [obj if world().rank == source else None]
    dist.broadcast_object_list(box, src=source, device=_object_device())
    received: T = box[0]
    return received


def gather(obj: T) -> list[T]:
    """Every rank's object, in rank order, on every rank (pickled)."""
    size = world().size
    if size == 1:
        return [obj]
    box: list[Any] = [None] * size
    dist.all_gather_object(box, obj)
    return box


def from_first(call: Callable[[], T]) -> T:
    """What `call` returns on rank 0, which alone runs it, on every rank; or its exception, raised on every rank."""
    if world().size == 1:
        return call()
    result: T | None = None
    error: Exception | None = None
    if world().rank == 0:
        try:
            result = call()
        except Exception as raised:
            error = raised
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def vote(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if world().size == 1:
        return flag
    ballot = torch.tensor([int(flag)], dtype=torch.int32, device=device())
    dist.all_reduce(ballot, op=dist.ReduceOp.MAX)
    return bool(ballot.item())


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, as a new tensor on the tensor's own device."""
    if world().size == 1:
        return tensor.clone()
    total = tensor.detach().to(device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def broadcast_tensors(tensors: Mapping[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
    """The source rank's tensors by name, in host memory on every rank; they are sent one by one."""
    rank, size, _ = world()
    if size == 1:
        return dict(tensors or {})
    facts = None
    if rank == source:
        facts = [(name, tuple(t.shape), t.dtype) for name, t in (tensors or {}).items()]
    received: dict[str, Tensor] = {}
    for name, shape, dtype in broadcast(facts, source) or []:
        if rank == source and tensors is not None:
            moved = tensors[name].detach().to(device()).contiguous()
        else:
            moved = torch.empty(shape, dtype=dtype, device=device())
        if moved.numel():
            dist.broadcast(moved.view(-1).view(torch.uint8), src=source)
        received[name] = moved.cpu()
    return received


def gather_by_id(ids: Int[Tensor, " b"], tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Every rank's rows, sorted by sample id, on every rank and in host memory.

    Rows with id -1 (padding) are dropped, and of rows with the same id the lowest rank's first one is kept, so the
    result doesn't depend on the number of ranks.

    Args:
        ids: sample id per row.
        tensors: by name, each with the same leading dimension as `ids`.

    Returns:
        The sorted ids, and the tensors' rows in that order.
    """
    parts = gather((ids.detach().cpu(), {name: t.detach().cpu() for name, t in tensors.items()}))
    all_ids = torch.cat([part[0] for part in parts])
    order = torch.argsort(all_ids, stable=True)
    sorted_ids = all_ids[order]
    keep = sorted_ids >= 0
    keep[1:] &= sorted_ids[1:] != sorted_ids[:-1]
    chosen = order[keep]
    return sorted_ids[keep], {name: torch.cat([part[1][name] for part in parts])[chosen] for name in tensors}


def _object_device() -> torch.device | None:
    """Where pickled objects are sent from: gloo takes host memory, NCCL only the device's."""
    return device() if dist.get_backend() == "nccl" else None
