"""The state of a run between steps, in fragments that any ZeRO stage, world size and precision can read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline import ranks
from pipeline.stages.base import Stage
from pipeline.train.engine import layout
from pipeline.train.engine.base import Fragment, Read, Span, TensorFacts
from pipeline.train.engine.ema import MovingAverage

GROUP_SETTINGS = ("lr", "weight_decay", "lr_scale")

NamedParameters = Sequence[tuple[str, nn.Parameter]]
ReadValue = Callable[[str, int, int], Tensor]  # fp32 elements [start, stop) of a flattened parameter


class BuiltStage(NamedTuple):
    """What must be noted of a stage before DeepSpeed rounds and partitions its parameters."""

    stage: Stage
    groups: Sequence[NamedParameters]  # trainable parameters by optimizer group
    frozen: list[str]  # names of the other parameters
    facts: dict[str, TensorFacts]  # of parameters and persistent buffers, in the order of the module's state
    values: dict[str, Tensor]  # fp32 values of all parameters

    @classmethod
    def of(cls, stage: Stage, groups: Sequence[NamedParameters]) -> BuiltStage:
        """Note it now."""
        parameters = dict(stage.named_parameters())
        trainable = {name for group in groups for name, _ in group}
        facts = {}
        for name, value in stage.state_dict().items():
            if name in parameters:
                kind = "parameter" if name in trainable else "frozen"
                facts[name] = TensorFacts(tuple(value.shape), kind, "float32")
            else:
                facts[name] = TensorFacts(tuple(value.shape), "buffer", str(value.dtype).removeprefix("torch."))
        values = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items()}
        return cls(stage, groups, [name for name in parameters if name not in trainable], facts, values)


class PortableState:
    """A rank's share of the fp32 masters, moments, frozen parameters and moving average, and all buffers.

    Masters and the forward's copies begin with the values of the stage as it was built: bf16 rounds only the copies.

    Args:
        engine: DeepSpeed's, over `built`'s stage.
        built: the stage before that engine was made.
        zero_stage: of the engine.
        ema_decay: factor of the moving average in a step, by the samples seen before it; None: no average.
    """

    def __init__(
        self, engine: Any, built: BuiltStage, zero_stage: int, ema_decay: Callable[[int], float] | None
    ) -> None:
        self.slots = layout.find_slots(engine, zero_stage, built.groups)
        self.facts = built.facts
        self._engine = engine
        self._zero_stage = zero_stage
        self._world = ranks.world()
        self._stage = built.stage
        self._parameters = dict(built.stage.named_parameters())
        self._frozen = built.frozen
        self._frozen_share: dict[Span, Tensor] = {}
        self._set_values(lambda name, start, stop: built.values[name].view(-1)[start:stop])
        self.average = None if ema_decay is None else MovingAverage(self.slots, self._buffers, ema_decay)

    def snapshot(self) -> Iterable[Fragment]:
        """See `Engine.snapshot`. Nothing is gathered; buffers are rank 0's, since all ranks have the same."""
        inner = layout.inner_optimizer(self._engine)
        for slot in self._saved_slots():
            tensors = {"value": slot.master}
            settings = inner.param_groups[slot.group]
            group = {key: float(settings[key]) for key in GROUP_SETTINGS}
            for key, state in inner.state.get(slot.flat, {}).items():
                if isinstance(state, Tensor) and state.numel() == slot.flat.numel() and state.ndim:
                    tensors[key] = slot.view_of(state)
                elif state is not None:
                    group[key] = float(state)
            if self.average is not None:
                tensors["ema"] = self.average.of(slot)
            yield Fragment(slot.name, slot.start, slot.stop, tensors, group)
        for span, value in self._frozen_share.items():
            yield Fragment(*span, {"value": value}, {})
        if self._world.rank == 0:
            for name, buffer in self._buffers():
                tensors = {"value": buffer.detach().reshape(-1)}
                average = self._average_of_buffer(name)
                if average is not None:
                    tensors["ema"] = average.reshape(-1)
                yield Fragment(name, 0, buffer.numel(), tensors, {})

    def wanted(self) -> list[Span]:
        """See `Engine.wanted`."""
        spans = [Span(slot.name, slot.start, slot.stop) for slot in self.slots]
        spans += [Span(name, 0, layout.full_numel(self._parameters[name])) for name in self._frozen]
        return spans + [Span(name, 0, buffer.numel()) for name, buffer in self._buffers()]

    def restore(self, read: Read) -> None:
        """See `Engine.restore`."""
        layout.inner_optimizer(self._engine).state.clear()
        for slot in self.slots:
            fragment = read(slot.name, slot.start, slot.stop)
            self._restore_optimizer(slot, fragment)
            if self.average is not None:
                self.average.of(slot).copy_(fragment.tensors.get("ema", fragment.tensors["value"]))
        self._set_values(lambda name, start, stop: read(name, start, stop).tensors["value"])
        layout.forget_linked_states(self._engine)
        with torch.no_grad():
            for name, buffer in self._buffers():
                tensors = read(name, 0, buffer.numel()).tensors
                buffer.copy_(tensors["value"].view(buffer.shape))
                average = self._average_of_buffer(name)
                if average is not None:
                    average.copy_(tensors.get("ema", tensors["value"]).view(buffer.shape))

    def swap_average(self) -> None:
        """Exchange the weights and their moving average, so that nothing more is held in memory.

        Raises:
            ValueError: there is no moving average.
        """
        if self.average is None:
            raise ValueError("there is no moving average of the weights: the configuration has no `ema`")
        self.average.swap()
        layout.publish_masters(self._engine, self._zero_stage)

    def _restore_optimizer(self, slot: layout.Slot, fragment: Fragment) -> None:
        inner = layout.inner_optimizer(self._engine)
        settings, state = inner.param_groups[slot.group], inner.state[slot.flat]
        for key, setting in fragment.group.items():
            if key in GROUP_SETTINGS:
                settings[key] = setting
            else:  # the count of steps: torch keeps one per flat tensor, as a scalar tensor
                state[key] = torch.tensor(setting, dtype=torch.float32)
        for key, part in fragment.tensors.items():
            if key not in ("value", "ema"):
                if key not in state:  # once for a flat tensor, which may hold hundreds of parameters
                    state[key] = torch.zeros_like(slot.flat).detach()
                slot.view_of(state[key]).copy_(part)

    def _saved_slots(self) -> list[layout.Slot]:
        """Slots that this rank saves: at stage 0 an equal part of what every rank holds."""
        if self._zero_stage > 0:
            return self.slots
        by_name = {slot.name: slot for slot in self.slots}
        sizes = [(slot.name, slot.stop) for slot in self.slots]
        shares = layout.equal_shares(sizes, self._world.rank, self._world.size)
        return [by_name[name].part(start, stop) for name, start, stop in shares]

    def _set_values(self, read: ReadValue) -> None:
        """Set masters, frozen parameters and the forward's copies."""
        with torch.no_grad():
            for slot in self.slots:
                slot.master.copy_(read(slot.name, slot.start, slot.stop))
        layout.publish_masters(self._engine, self._zero_stage)
        sizes = [(name, layout.full_numel(self._parameters[name])) for name in self._frozen]
        self._frozen_share.clear()
        for name, start, stop in layout.equal_shares(sizes, self._world.rank, self._world.size):
            self._frozen_share[Span(name, start, stop)] = read(name, start, stop).clone()
        for name, size in sizes:
            layout.set_frozen(self._parameters[name], read(name, 0, size), self._world.rank)

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """The persistent ones by name, as they are now."""
        return [(name, buffer) for name, buffer in self._stage.named_buffers() if name in self.facts]

    def _average_of_buffer(self, name: str) -> Tensor | None:
        return None if self.average is None else self.average.of_buffer(name)
