"""The engine on DeepSpeed: ZeRO stages 0 to 3 in bf16 and fp32, with exact accumulation and portable state.

Comments beside the code say what DeepSpeed 0.19 needs care with; docs/decisions.md gives the reasons.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.data.batch import Batch, derive_seed
from pipeline.evaluate.base import Predictions
from pipeline.stages.base import ContrastiveStage, Losses, Stage
from pipeline.train.config import OptimConfig
from pipeline.train.engine import layout
from pipeline.train.engine.accumulation import GradientSums
from pipeline.train.engine.base import Fragment, Read, Span, StepResult, TensorFacts
from pipeline.train.engine.deepspeed_setup import BUCKET_ELEMENTS, initialize, join_group, settings_for
from pipeline.train.engine.gradcache import GradCache
from pipeline.train.engine.losses import over_all_ranks, present_ids, total_weight
from pipeline.train.engine.portable import BuiltStage, PortableState
from pipeline.train.engine.running_statistics import RunningStatistics
from pipeline.train.optim import ParamGroup, build_optimizer, parameter_groups


class DeepSpeedEngine:
    """`Engine` over a built stage; makes the stage's parameters DeepSpeed's.

    Args:
        stage: with fp32 parameters, equal on all ranks.
        optim: optimizer settings.
        zero_stage: 0 replicates everything, 1 partitions optimizer state, 2 gradients too, 3 parameters too.
        precision: of forward and backward; masters and moments are fp32 always.
        peak_lr: highest learning rate, at which groups start.
        seed: of what draws from torch's global generator (dropout).
        ema_decay: factor of the weights' moving average in a step, by the samples seen before it; None: no average.
    """

    def __init__(
        self,
        stage: Stage,
        optim: OptimConfig,
        *,
        zero_stage: int,
        precision: Literal["bf16", "fp32"],
        peak_lr: float,
        seed: int = 0,
        ema_decay: Callable[[int], float] | None = None,
    ) -> None:
        join_group()
        self.stage = stage
        self.zero_stage = zero_stage
        self.precision = precision
        self.seed = seed
        self.world = ranks.world()
        self.device = ranks.device()
        self.busy_s = 0.0
        groups = parameter_groups(stage, optim)
        self._trained = [parameter for group in groups for parameter in group["params"]]
        built = BuiltStage.of(stage, [list(zip(g["names"], g["params"], strict=True)) for g in groups])
        self._linear = torch.nn.functional.linear
        settings = settings_for(groups, optim, zero_stage=zero_stage, precision=precision)
        self._ds = initialize(stage, build_optimizer(groups, optim, peak_lr), settings)
        # In bf16, stage 0 has taken a step with zero gradients by now, which counts as one in Adam's bias correction.
        layout.inner_optimizer(self._ds).state.clear()
        if zero_stage == 0:
            self._ds.enable_backward_allreduce = False  # `_update` reduces, to look at the sum before it is applied
        self._set_lr_scales(groups)
        self._state = PortableState(self._ds, built, zero_stage, ema_decay)
        self._running_statistics = RunningStatistics(stage)

    def step(
        self, micro: Sequence[Batch], lr: float, *, stop: bool = False, loss_limit: float = math.inf
    ) -> StepResult:
        """See `Engine.step`. The gradient is that of sum(weight * loss) / sum(weight) over the global batch."""
        torch.manual_seed(derive_seed("step", self.seed, micro[0].position))
        self.stage.train()
        self._set_lr(lr)
        batches = [batch.to(self.device) for batch in micro]
        weight = total_weight(batches)
        if weight == 0:
            return self.skip(stop=stop)
        if self.zero_stage == 3:
            layout.clear_partitioned_gradients(self._ds)
        self.busy_s = 0.0
        losses, bad = self._backward_all(batches, factor=self.world.size / weight)  # DeepSpeed averages, we want sums
        total = over_all_ranks(losses, weight, bad=bool(bad), stop=stop)
        cause = "loss" if total.any_bad else "spike" if total.mean > loss_limit else ""
        if cause == "spike":
            self._spoil(batches[0])
            if len(losses) == len(batches):  # a contrastive loss is of all of them together
                bad = [
                    b for b, of_b in zip(batches, losses, strict=True) if float(of_b.total) > loss_limit * _weight(b)
                ]
        norm, applied = self._update(any_bad=bool(cause))
        suspects: tuple[int, ...] = ()
        if applied:
            self._running_statistics.average()
            if self._state.average is not None:
                self._state.average.update(micro[0].position)
        else:
            suspects = (present_ids(bad) if cause else ()) or present_ids(batches)
            cause = cause or "gradient"
        return StepResult(total.mean, total.parts, norm, applied, total.stop, cause, suspects)

    def skip(self, *, stop: bool = False) -> StepResult:
        """See `Engine.skip`."""
        return StepResult(0.0, {}, 0.0, applied=False, stop=ranks.vote(stop))

    def predict(self, batch: Batch) -> Predictions:
        """See `Engine.predict`."""
        self.stage.eval()
        try:
            with torch.no_grad():
                predictions: Predictions = self._ds("predict", batch.to(self.device))
        finally:
            self.stage.train()
        return predictions

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """See `Engine.averaged`."""
        self._state.swap_average()
        try:
            yield
        finally:
            self._state.swap_average()

    def facts(self) -> dict[str, TensorFacts]:
        """See `Engine.facts`."""
        return dict(self._state.facts)

    def snapshot(self) -> Iterable[Fragment]:
        """See `Engine.snapshot`."""
        return self._state.snapshot()

    def wanted(self) -> list[Span]:
        """See `Engine.wanted`."""
        return self._state.wanted()

    def restore(self, read: Read) -> None:
        """See `Engine.restore`."""
        self._state.restore(read)

    def close(self) -> None:
        """Release DeepSpeed's hooks and memory; the process group stays."""
        self._ds.destroy()
        torch.nn.functional.linear = self._linear  # ZeRO-3 replaces it for the whole process, with other rounding

    def _backward_all(self, batches: Sequence[Batch], factor: float) -> tuple[list[Losses], list[Batch]]:
        """Forward and backward of all micro batches; the losses, and the batches whose loss isn't finite."""
        # ZeRO 0 and 1 would add micro batches up in bf16; 2 and 3 are configured to keep fp32 sums.
        rounds = self.zero_stage < 2 and self.precision == "bf16" and len(batches) > 1
        sums = GradientSums(self._trained, enabled=rounds)
        contrastive = isinstance(self.stage, ContrastiveStage) and len(batches) > 1
        losses, bad = (self._backward_contrastive if contrastive else self._backward_each)(batches, factor, sums)
        sums.write_back()
        return losses, bad

    def _backward_each(
        self, batches: Sequence[Batch], factor: float, sums: GradientSums
    ) -> tuple[list[Losses], list[Batch]]:
        losses, bad = [], []
        for batch in batches:
            with self._busy():
                of_batch = self._ds("loss", batch)
                is_bad = _is_bad(of_batch.total)  # waits for a GPU to be done
            self._backward(of_batch.total, factor, is_bad=is_bad)
            if is_bad:
                bad.append(batch)
            sums.add()
            losses.append(Losses(of_batch.total.detach(), of_batch.parts))
        return losses, bad

    def _backward_contrastive(
        self, batches: Sequence[Batch], factor: float, sums: GradientSums
    ) -> tuple[list[Losses], list[Batch]]:
        cache = GradCache(self._ds, batches, self.seed)
        with self._busy():
            cache.embed()
        losses = cache.losses()
        is_bad = _is_bad(losses.total)
        self._backward(losses.total, factor, is_bad=is_bad)
        for surrogate in cache.surrogates():
            self._backward(surrogate, 1.0, is_bad=_is_bad(surrogate))
            sums.add()
        return [Losses(losses.total.detach(), losses.parts)], list(batches) if is_bad else []

    def _backward(self, total: Tensor, factor: float, *, is_bad: bool) -> None:
        """Backward of total x factor. Where total isn't finite every gradient is made NaN, so that DeepSpeed skips the
        update on all ranks by its own rules.
        """
        self._ds.backward(total * (float("nan") if is_bad else factor), scale_wrt_gas=False)

    def _spoil(self, batch: Batch) -> None:
        """Make the gradients NaN, so that DeepSpeed skips the update by its own rules and empties its buffers."""
        if self.zero_stage > 0:
            self._ds.backward(self._ds("loss", batch).total * float("nan"), scale_wrt_gas=False)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        """Add the block's time to `busy_s`."""
        began = time.perf_counter()
        yield
        self.busy_s += time.perf_counter() - began

    def _update(self, *, any_bad: bool) -> tuple[float, bool]:
        """Reduce gradients and update; the gradient's norm and whether anything was changed."""
        if self.zero_stage == 0:
            if self.world.size > 1:  # it would copy every gradient back and forth for nothing
                self._ds.buffered_allreduce_fallback(elements_per_buffer=BUCKET_ELEMENTS)
            grads = [parameter.grad for parameter in self._trained if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm([grad.float() for grad in grads])
            if any_bad or not bool(torch.isfinite(norm)):  # DeepSpeed itself would apply NaN in fp32
                for parameter in self._trained:
                    parameter.grad = None
                return float(norm), False
        self._ds.step()
        applied = bool(self._ds.was_step_applied())
        if applied:
            self._hold_limits()
        if self.zero_stage > 0:
            norm = self._ds.get_global_grad_norm()
        return float("inf") if norm is None else float(norm), applied

    def _hold_limits(self) -> None:
        """Clamp the parameters that the stage limits, masters and the forward's copies."""
        limits = self.stage.limits
        if not limits:
            return
        with torch.no_grad():
            for slot in self._state.slots:
                if slot.name in limits:
                    slot.master.clamp_(*limits[slot.name])
            for name, parameter in self.stage.named_parameters():
                if name in limits:
                    layout.clamp_visible(parameter, *limits[name])

    def _set_lr(self, lr: float) -> None:
        for group in layout.inner_optimizer(self._ds).param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _set_lr_scales(self, groups: Sequence[ParamGroup]) -> None:
        for group, of_stage in zip(layout.inner_optimizer(self._ds).param_groups, groups, strict=True):
            group["lr_scale"] = of_stage["lr_scale"]


def _is_bad(total: Tensor) -> bool:
    return not bool(torch.isfinite(total.detach()))


def _weight(batch: Batch) -> float:
    return float(batch.weight.sum())
