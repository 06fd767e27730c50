"""The moving average of the weights, in fp32 beside each rank's own masters: nothing is gathered.

With a half-life of h samples and a global batch of G, each step keeps `0.5 ** (G / h)` of the average, so a recipe
means the same at any batch size. The optional ramp-up, which shortens the half-life to a share of the samples seen so
far, and the formula are EDM's (Karras et al. 2022); the update is timm's `ModelEmaV3`. Buffers of floating-point type
are averaged too, as timm does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pipeline.train.config import EmaConfig
from pipeline.train.engine.layout import Slot


def decay_after(config: EmaConfig, samples: int, global_batch: int) -> float:
    """The average's decay in the step that begins after `samples`."""
    half_life = float(config.half_life_samples)
    if config.rampup_ratio is not None:
        half_life = min(half_life, (samples + global_batch) * config.rampup_ratio)
    return float(0.5 ** (global_batch / half_life))


class MovingAverage:
    """Averages of the flat masters that slots lie in, and of buffers.

    Args:
        slots: this rank's; the average begins with their masters.
        buffers: gives the module's persistent buffers by name, as they are now.
        decay: factor of the average in a step, by the samples seen before it.
    """

    def __init__(
        self,
        slots: Iterable[Slot],
        buffers: Callable[[], Iterable[tuple[str, Tensor]]],
        decay: Callable[[int], float],
    ) -> None:
        self._decay = decay
        self._buffers = buffers
        flats = {id(slot.flat): slot.flat for slot in slots}
        self._flats = {key: flat.detach() for key, flat in flats.items()}
        self._averages = {key: flat.clone() for key, flat in self._flats.items()}
        self._buffer_averages = {name: value.detach().clone() for name, value in self._floating_buffers()}

    def update(self, samples: int) -> None:
        """Average the weights in, after the step that began at `samples`."""
        share = 1.0 - self._decay(samples)
        pairs = [(self._averages[key], flat) for key, flat in self._flats.items()]
        pairs += [(self._buffer_averages[name], value) for name, value in self._floating_buffers()]
        with torch.no_grad():
            for average, value in pairs:
                average.lerp_(value, share)

    def of(self, slot: Slot) -> Tensor:
        """A view of a slot's average."""
        return slot.view_of(self._averages[id(slot.flat)])

    def of_buffer(self, name: str) -> Tensor | None:
        """A buffer's average; None for one of integers."""
        return self._buffer_averages.get(name)

    def swap(self) -> None:
        """Exchange weights and averages, bit for bit; a second call undoes it. The forward's copies aren't updated."""
        pairs = [(self._averages[key], flat) for key, flat in self._flats.items()]
        pairs += [(self._buffer_averages[name], value) for name, value in self._floating_buffers()]
        with torch.no_grad():
            for average, value in pairs:
                previous = value.detach().clone()
                value.copy_(average)
                average.copy_(previous)

    def _floating_buffers(self) -> list[tuple[str, Tensor]]:
        return [(name, value.detach()) for name, value in self._buffers() if value.is_floating_point()]
