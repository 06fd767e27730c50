"""Where DeepSpeed keeps the fp32 masters and the optimizer's state of each parameter.

This file uses private names of DeepSpeed 0.19, which tests/contract/test_deepspeed_names.py checks. The layouts:

- ZeRO 0 in fp32: the module's own parameters; the optimizer's state by parameter.
- ZeRO 0 in bf16: `FP16_UnfusedOptimizer.fp32_groups`, one master per parameter.
- ZeRO 1 and 2: `single_partition_of_fp32_groups`, one flat master per parameter group and rank, with
  `p._hp_mapping`: which part of a parameter lies where in it.
- ZeRO 3: `fp32_partitioned_groups_flat`, one flat master per sub-group; each parameter is cut into equal parts, the
  last one padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Slot(NamedTuple):
    """The part [start, stop) of parameter `name` whose master this rank keeps at `offset` of `flat`."""

    name: str
    start: int
    stop: int
    flat: Tensor  # the tensor the inner optimizer updates: key of its state
    offset: int
    group: int  # number of the parameter group

    @property
    def master(self) -> Tensor:
        """A view of the fp32 values."""
        return self.view_of(self.flat)

    def view_of(self, like_flat: Tensor) -> Tensor:
        """The same part of a tensor laid out as `flat` is (a moment)."""
        return like_flat.detach().view(-1).narrow(0, self.offset, self.stop - self.start)

    def part(self, start: int, stop: int) -> Slot:
        """The slot of [start, stop), which lies within this one."""
        return self._replace(start=start, stop=stop, offset=self.offset + start - self.start)


def find_slots(engine: Any, zero_stage: int, groups: Sequence[Sequence[tuple[str, nn.Parameter]]]) -> list[Slot]:
    """The slots of this rank: at stage 0 all of every parameter, else its partition.

    Args:
        engine: the DeepSpeed engine.
        zero_stage: its ZeRO stage.
        groups: (name, parameter) of the trainable parameters by parameter group, as given to the optimizer.
    """
    optimizer = engine.optimizer
    if zero_stage == 3:
        return [_slot_stage3(optimizer, n, p, g) for g, group in enumerate(groups) for n, p in group if _has_share(p)]
    if zero_stage == 0:
        masters = getattr(optimizer, "fp32_groups", None)
        return [
            Slot(name, 0, p.numel(), p if masters is None else masters[g][i], 0, g)
            for g, group in enumerate(groups)
            for i, (name, p) in enumerate(group)
        ]
    flats = optimizer.single_partition_of_fp32_groups
    slots = []
    for g, group in enumerate(groups):
        for name, p in group:
            mapping = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                slots.append(Slot(name, low.start, low.start + low.numel, flats[g], high.start, g))
    return slots


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer below DeepSpeed's wrapper."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def publish_masters(engine: Any, zero_stage: int) -> None:
    """Update the forward's weights on all ranks, after the masters were set from outside."""
    optimizer = engine.optimizer
    with torch.no_grad():
        if zero_stage == 3:
            optimizer._partition_all_parameters()
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            persistent = optimizer.persistent_parameters
            if len(persistent) > 0:
                persistent[0].all_gather(persistent)
        elif zero_stage > 0:
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_groups"):
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for p, master in zip(low, high, strict=True):
                    p.data.copy_(master.data)


def forget_linked_states(engine: Any) -> None:
    """Drop DeepSpeed's views of the optimizer's state, after that state was replaced."""
    if getattr(engine.optimizer, "_hp_optimizer_states_linked", False):
        engine.optimizer._hp_optimizer_states_linked = False


def clear_partitioned_gradients(engine: Any) -> None:
    """ZeRO-3: forget the gradients of the last step.

    The first backward pass of a step may not reach every parameter (GradCache's reaches the head only), and DeepSpeed
    would add the gradients of those reached later to what the last step left.
    """
    engine.optimizer.grad_partitions_flat_buffer.zero_()


def set_frozen(parameter: nn.Parameter, value: Tensor, rank: int) -> None:
    """Set a parameter outside the optimizer from its full value."""
    with torch.no_grad():
        if not hasattr(parameter, "ds_tensor"):
            parameter.data.copy_(value.view(parameter.shape))
            return
        part = parameter.ds_tensor
        start = min(rank * part.numel(), value.numel())
        stop = min(start + part.numel(), value.numel())
        part.data.view(-1)[: stop - start].copy_(value.reshape(-1)[start:stop])
        if parameter.data.numel() == value.numel():  # kept whole between steps, being small
            parameter.data.copy_(value.view(parameter.shape))


def clamp_visible(parameter: nn.Parameter, low: float, high: float) -> None:
    """Clamp the forward's copy of a parameter; the caller clamps the master."""
    with torch.no_grad():
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data.clamp_(low, high)
        if parameter.data.numel():
            parameter.data.clamp_(low, high)


def full_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 keeps only a part of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 keeps only a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def equal_shares(sizes: Iterable[tuple[str, int]], rank: int, world_size: int) -> list[tuple[str, int, int]]:
    """Rank's [start, stop) of each named tensor when their concatenation is cut into equal parts."""
    sizes = list(sizes)
    share = math.ceil(sum(size for _, size in sizes) / world_size)
    low, high = rank * share, (rank + 1) * share
    spans, at = [], 0
    for name, size in sizes:
        start, stop = max(low - at, 0), min(high - at, size)
        if start < stop:
            spans.append((name, start, stop))
        at += size
    return spans


def _slot_stage3(optimizer: Any, name: str, parameter: nn.Parameter, group: int) -> Slot:
    number, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = _rank_of_part() * size
    stop = min(start + size, full_numel(parameter))
    return Slot(name, start, stop, optimizer.fp32_partitioned_groups_flat[number], offset, group)


def _has_share(parameter: nn.Parameter) -> bool:
    """Whether this rank's part of a ZeRO-3 parameter is more than padding."""
    part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return _rank_of_part() * part.numel() < full_numel(parameter)


def _rank_of_part() -> int:
    return torch.distributed.get_rank()
