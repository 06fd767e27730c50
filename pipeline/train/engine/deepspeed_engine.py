"""The engine on DeepSpeed: ZeRO stages 0 to 3 in bf16 and fp32, with exact accumulation and portable state.

What DeepSpeed 0.19 needs care with, and how it is met here, stands beside the code; docs/decisions.md says why each
was chosen.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import ranks
from pipeline.data.batch import Batch, derive_seed
from pipeline.evaluate.base import Predictions
from pipeline.stages.base import ContrastiveStage, Losses, Stage
from pipeline.train.config import OptimConfig
from pipeline.train.engine import layout
from pipeline.train.engine.base import Fragment, Read, Span, StepResult, TensorFacts
from pipeline.train.engine.ema import MovingAverage
from pipeline.train.optim import ParamGroup, build_optimizer, parameter_groups

BUCKET_ELEMENTS = 50_000_000  # of a reduction; DeepSpeed's default of 5e8 allocates 2 GB at once
GROUP_SETTINGS = ("lr", "weight_decay", "lr_scale")


def join_group() -> None:
    """Enter the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); where it
    describes none, one of this process alone.
    """
    deepspeed = _deepspeed()
    if ranks.device().type == "cuda":
        torch.cuda.set_device(ranks.device())
    if not dist.is_initialized():
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, value)
        if "MASTER_PORT" not in os.environ and os.environ["WORLD_SIZE"] == "1":
            with socket.socket() as probe:  # at a fixed port two lone processes of one machine would meet
                probe.bind((os.environ["MASTER_ADDR"], 0))
                os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    with _quiet():
        deepspeed.init_distributed(verbose=False)


class DeepSpeedEngine:
    """`Engine` over a built stage; makes the stage's parameters DeepSpeed's.

    Args:
        stage: with fp32 parameters, equal on all ranks.
        optim: optimizer settings.
        zero_stage: 0 replicates everything, 1 partitions optimizer state, 2 gradients too, 3 parameters too.
        precision: of forward and backward; masters and moments are fp32 always.
        peak_lr: highest learning rate, at which groups start.
        seed: of what draws from torch's global generator (dropout).
        ema_decay: what a step keeps of the weights' moving average, by the samples seen before it; None: there is none.
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
        groups = parameter_groups(stage, optim)
        self._groups = [list(zip(g["names"], g["params"], strict=True)) for g in groups]
        self._parameters = dict(stage.named_parameters())
        trained = {name for group in self._groups for name, _ in group}
        self._frozen = [name for name in self._parameters if name not in trained]
        built = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self._parameters.items()}
        self._facts = _facts(stage, set(self._frozen))
        self._frozen_share: dict[Span, Tensor] = {}
        self.busy_s = 0.0
        self._linear = torch.nn.functional.linear
        self._ds = _initialize(stage, build_optimizer(groups, optim, peak_lr), self._settings(groups, optim))
        # In bf16, stage 0 has taken a step with zero gradients by now, which counts as one in Adam's bias correction.
        layout.inner_optimizer(self._ds).state.clear()
        if zero_stage == 0:
            self._ds.enable_backward_allreduce = False  # `_update` reduces, to look at the sum before it is applied
        self._set_lr_scales(groups)
        self._slots = layout.find_slots(self._ds, zero_stage, self._groups)
        self._set_values(lambda name, start, stop: built[name].view(-1)[start:stop])
        self._average = None if ema_decay is None else MovingAverage(self._slots, self._buffers, ema_decay)
        self._running_statistics = [
            buffer
            for module in stage.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    def step(
        self, micro: Sequence[Batch], lr: float, *, stop: bool = False, loss_limit: float = math.inf
    ) -> StepResult:
        """See `Engine.step`. The gradient is that of sum(weight * loss) / sum(weight) over the global batch."""
        torch.manual_seed(derive_seed("step", self.seed, micro[0].position))
        self.stage.train()
        self._set_lr(lr)
        batches = [batch.to(self.device) for batch in micro]
        weight = float(ranks.sum_over_ranks(torch.cat([batch.weight.double() for batch in batches]).sum()))
        if weight == 0:
            return self.skip(stop=stop)
        if self.zero_stage == 3:
            # The first backward of a step may not reach every parameter (GradCache's reaches the head only), and
            # those reached later would be added to what the step before left here.
            self._ds.optimizer.grad_partitions_flat_buffer.zero_()
        factor = self.world.size / weight  # DeepSpeed averages over ranks; we want the sum
        self.busy_s = 0.0
        if isinstance(self.stage, ContrastiveStage) and len(batches) > 1:
            losses, bad = self._backward_contrastive(batches, factor)
        else:
            losses, bad = self._backward_plain(batches, factor)
        names = sorted({name for one in losses for name in one.parts})
        sums = [torch.stack([one.total.detach().double() for one in losses]).sum()]
        sums += [torch.stack([one.parts[name].detach().double() for one in losses]).sum() for name in names]
        told = ranks.sum_over_ranks(
            torch.stack([*sums, torch.tensor(float(bool(bad)), device=sums[0].device).double(), _as(sums[0], stop)])
        ).tolist()
        means = [total / weight for total in told[: 1 + len(names)]]
        cause = "loss" if told[-2] > 0 else "spike" if means[0] > loss_limit else ""
        if cause == "spike":
            self._spoil(batches[0])
            if len(losses) == len(batches):  # a contrastive loss is of all of them together
                bad = [b for b, one in zip(batches, losses, strict=True) if float(one.total) > loss_limit * _weight(b)]
        norm, applied = self._update(bool(cause))
        suspects: tuple[int, ...] = ()
        if not applied:
            suspects = (_suspects(bad) if cause else ()) or _suspects(batches)
            cause = cause or "gradient"
        else:
            if self._running_statistics:
                self._average_running_statistics()
            if self._average is not None:
                self._average.update(micro[0].position)
        parts = dict(zip(names, means[1:], strict=True))
        return StepResult(means[0], parts, norm, applied, told[-1] > 0, cause, suspects)

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
        """See `Engine.averaged`. Weights and averages change places, so nothing more is held in memory."""
        if self._average is None:
            raise ValueError("no moving average is kept: the configuration has no `ema`")
        self._swap_average(self._average)
        try:
            yield
        finally:
            self._swap_average(self._average)

    def facts(self) -> dict[str, TensorFacts]:
        """See `Engine.facts`."""
        return dict(self._facts)

    def snapshot(self) -> Iterable[Fragment]:
        """See `Engine.snapshot`. Nothing is gathered; buffers are rank 0's, being equal on all."""
        inner = layout.inner_optimizer(self._ds)
        for slot in self._own_slots():
            tensors = {"value": slot.master}
            settings = inner.param_groups[slot.group]
            group = {key: float(settings[key]) for key in GROUP_SETTINGS}
            for key, kept in inner.state.get(slot.flat, {}).items():
                if isinstance(kept, Tensor) and kept.numel() == slot.flat.numel() and kept.ndim:
                    tensors[key] = slot.view_of(kept)
                elif kept is not None:
                    group[key] = float(kept)
            if self._average is not None:
                tensors["ema"] = self._average.of(slot)
            yield Fragment(slot.name, slot.start, slot.stop, tensors, group)
        for span, value in self._frozen_share.items():
            yield Fragment(*span, {"value": value}, {})
        if self.world.rank == 0:
            for name, buffer in self._buffers():
                average = self._average.of_buffer(name) if self._average is not None else None
                kept_too = {} if average is None else {"ema": average.reshape(-1)}
                yield Fragment(name, 0, buffer.numel(), {"value": buffer.detach().reshape(-1), **kept_too}, {})

    def wanted(self) -> list[Span]:
        """See `Engine.wanted`."""
        spans = [Span(slot.name, slot.start, slot.stop) for slot in self._slots]
        spans += [Span(name, 0, layout.full_numel(self._parameters[name])) for name in self._frozen]
        return spans + [Span(name, 0, buffer.numel()) for name, buffer in self._buffers()]

    def restore(self, read: Read) -> None:
        """See `Engine.restore`."""
        inner = layout.inner_optimizer(self._ds)
        inner.state.clear()
        for slot in self._slots:
            fragment = read(slot.name, slot.start, slot.stop)
            settings = inner.param_groups[slot.group]
            for key, setting in fragment.group.items():
                if key in GROUP_SETTINGS:
                    settings[key] = setting
                else:  # the count of steps: torch keeps one per flat tensor, as a scalar tensor
                    inner.state[slot.flat][key] = torch.tensor(setting, dtype=torch.float32)
            for key, part in fragment.tensors.items():
                if key not in ("value", "ema"):
                    moments = inner.state[slot.flat]
                    if key not in moments:  # once for a flat tensor, which may hold hundreds of parameters
                        moments[key] = torch.zeros_like(slot.flat).detach()
                    slot.view_of(moments[key]).copy_(part)
            if self._average is not None:
                self._average.of(slot).copy_(fragment.tensors.get("ema", fragment.tensors["value"]))
        self._set_values(lambda name, start, stop: read(name, start, stop).tensors["value"])
        if getattr(self._ds.optimizer, "_hp_optimizer_states_linked", False):
            self._ds.optimizer._hp_optimizer_states_linked = False  # its views show the state that was cleared
        with torch.no_grad():
            for name, buffer in self._buffers():
                tensors = read(name, 0, buffer.numel()).tensors
                buffer.copy_(tensors["value"].view(buffer.shape))
                average = self._average.of_buffer(name) if self._average is not None else None
                if average is not None:
                    average.copy_(tensors.get("ema", tensors["value"]).view(buffer.shape))

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and memory; the process group stays."""
        self._ds.destroy()
        torch.nn.functional.linear = self._linear  # ZeRO-3 replaces it for the whole process, with other rounding

    def _settings(self, groups: Sequence[ParamGroup], optim: OptimConfig) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        sizes = [p.numel() for group in groups for p in group["params"]]
        on_gpu = self.device.type == "cuda"
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: we call step() ourselves
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": optim.clip_grad,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": self.zero_stage,
                "overlap_comm": on_gpu and self.zero_stage >= 2,
                "reduce_bucket_size": min(BUCKET_ELEMENTS, sum(sizes)),
                "allgather_bucket_size": BUCKET_ELEMENTS,
                "stage3_param_persistence_threshold": min(100_000, sum(sizes) // 1000),
                "stage3_prefetch_bucket_size": min(BUCKET_ELEMENTS, sum(sizes)),
            },
        }
        if self.precision == "bf16":
            settings["bf16"] = {"enabled": True}
            if self.zero_stage >= 2:
                settings["data_types"] = {"grad_accum_dtype": "fp32"}
        return settings

    def _backward_plain(self, batches: Sequence[Batch], factor: float) -> tuple[list[Losses], list[Batch]]:
        losses, bad = [], []
        sums = _Accumulator(self._groups) if self._accumulates_here(batches) else None
        for batch in batches:
            began = time.perf_counter()
            one = self._ds("loss", batch)
            is_bad = not bool(torch.isfinite(one.total.detach()))  # waits for a GPU to be done
            self.busy_s += time.perf_counter() - began
            if self._backward(one.total, factor, is_bad=is_bad):
                bad.append(batch)
            if sums is not None:
                sums.take()
            losses.append(Losses(one.total.detach(), one.parts))
        if sums is not None:
            sums.give_back()
        return losses, bad

    def _backward_contrastive(self, batches: Sequence[Batch], factor: float) -> tuple[list[Losses], list[Batch]]:
        """GradCache (Gao et al. 2021): the loss over all micro batches, the memory of one."""
        sums = _Accumulator(self._groups) if self._accumulates_here(batches) else None
        seeds = [derive_seed("embed", self.seed, batch.position, k) for k, batch in enumerate(batches)]
        embedded: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for batch, seed in zip(batches, seeds, strict=True):
                torch.manual_seed(seed)
                began = time.perf_counter()
                embedded.append(self._ds("embed", batch))
                self.busy_s += time.perf_counter() - began
        leaves = tuple(torch.cat(parts).requires_grad_() for parts in zip(*embedded, strict=True))
        losses = self._ds("contrast", (leaves, torch.cat([batch.weight for batch in batches])))
        is_bad = self._backward(losses.total, factor, is_bad=not bool(torch.isfinite(losses.total.detach())))
        at = 0
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            again = self._ds("embed", batch)
            products = [
                (part.float() * _grad(leaf)[at : at + len(batch)].float()).sum()
                for part, leaf in zip(again, leaves, strict=True)
            ]
            surrogate = torch.stack(products).sum()
            self._backward(surrogate, 1.0, is_bad=not bool(torch.isfinite(surrogate.detach())))
            if sums is not None:
                sums.take()
            at += len(batch)
        if sums is not None:
            sums.give_back()
        return [Losses(losses.total.detach(), losses.parts)], list(batches) if is_bad else []

    def _backward(self, total: Tensor, factor: float, *, is_bad: bool) -> bool:
        """Backward of total x factor. Where total isn't finite every gradient is made NaN, so that DeepSpeed skips the
        update on all ranks by its own rules.
        """
        self._ds.backward(total * (float("nan") if is_bad else factor), scale_wrt_gas=False)
        return is_bad

    def _spoil(self, batch: Batch) -> None:
        """Make gradients NaN after all, so that DeepSpeed leaves the step out by its own rules, buffers emptied."""
        if self.zero_stage > 0:
            self._ds.backward(self._ds("loss", batch).total * float("nan"), scale_wrt_gas=False)

    def _accumulates_here(self, batches: Sequence[Batch]) -> bool:
        """ZeRO 0 and 1 in bf16 would add micro batches up in bf16; 2 and 3 are told to keep fp32 sums."""
        return self.zero_stage < 2 and self.precision == "bf16" and len(batches) > 1

    def _update(self, any_bad: bool) -> tuple[float, bool]:
        """Reduce gradients and update; the gradient's norm and whether anything was changed."""
        if self.zero_stage == 0:
            if self.world.size > 1:  # it would copy every gradient back and forth for nothing
                self._ds.buffered_allreduce_fallback(elements_per_buffer=BUCKET_ELEMENTS)
            grads = [p.grad for group in self._groups for _, p in group if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([grad.float() for grad in grads])
            if any_bad or not bool(torch.isfinite(norm)):  # DeepSpeed itself would apply NaN in fp32
                for group in self._groups:
                    for _, p in group:
                        p.grad = None
                return float(norm), False
        self._ds.step()
        applied = bool(self._ds.was_step_applied())
        if applied:
            self._hold_limits()
        if self.zero_stage > 0:
            norm = self._ds.get_global_grad_norm()
        return float("inf") if norm is None else float(norm), applied

    def _hold_limits(self) -> None:
        limits = self.stage.limits
        if not limits:
            return
        with torch.no_grad():
            for slot in self._slots:
                if slot.name in limits:
                    slot.master.clamp_(*limits[slot.name])
            for name, (low, high) in limits.items():
                if name in self._parameters:
                    layout.clamp_visible(self._parameters[name], low, high)

    def _own_slots(self) -> list[layout.Slot]:
        """Slots that this rank saves: at stage 0 an equal part of what every rank holds."""
        if self.zero_stage > 0:
            return self._slots
        by_name = {slot.name: slot for slot in self._slots}
        sizes = [(slot.name, slot.stop) for slot in self._slots]
        shares = layout.equal_shares(sizes, self.world.rank, self.world.size)
        return [by_name[name].part(start, stop) for name, start, stop in shares]

    def _swap_average(self, average: MovingAverage) -> None:
        average.swap()
        layout.publish_masters(self._ds, self.zero_stage)

    def _set_values(self, read: Any) -> None:
        """Set masters, frozen parameters and the forward's copies from fp32 values: bf16 rounds only the copies."""
        with torch.no_grad():
            for slot in self._slots:
                slot.master.copy_(read(slot.name, slot.start, slot.stop))
        layout.publish_masters(self._ds, self.zero_stage)
        sizes = [(name, layout.full_numel(self._parameters[name])) for name in self._frozen]
        self._frozen_share.clear()
        for name, start, stop in layout.equal_shares(sizes, self.world.rank, self.world.size):
            self._frozen_share[Span(name, start, stop)] = read(name, start, stop).clone()
        for name, size in sizes:
            layout.set_frozen(self._parameters[name], read(name, 0, size), self.world.rank)

    def _buffers(self) -> list[tuple[str, Tensor]]:
        kept = set(self._facts)
        return [(name, buffer) for name, buffer in self.stage.named_buffers() if name in kept]

    def _average_running_statistics(self) -> None:
        """BatchNorm's running statistics differ over ranks; their mean is kept, so that ranks predict alike."""
        flat = torch.cat([buffer.reshape(-1).float() for buffer in self._running_statistics])
        mean = ranks.sum_over_ranks(flat) / self.world.size
        at = 0
        for buffer in self._running_statistics:
            buffer.copy_(mean[at : at + buffer.numel()].view(buffer.shape))
            at += buffer.numel()

    def _set_lr(self, lr: float) -> None:
        for group in layout.inner_optimizer(self._ds).param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _set_lr_scales(self, groups: Sequence[ParamGroup]) -> None:
        for group, ours in zip(layout.inner_optimizer(self._ds).param_groups, groups, strict=True):
            group["lr_scale"] = ours["lr_scale"]


class _Accumulator:
    """fp32 sums of low-precision gradients over micro batches."""

    def __init__(self, groups: Sequence[Sequence[tuple[str, nn.Parameter]]]) -> None:
        self._parameters = [p for group in groups for _, p in group]
        self._sums: list[Tensor | None] = [None] * len(self._parameters)

    def take(self) -> None:
        """Add what the last backward left, and clear it."""
        for i, p in enumerate(self._parameters):
            if p.grad is not None:
                kept = self._sums[i]
                self._sums[i] = p.grad.float() if kept is None else kept.add_(p.grad)
                p.grad = None

    def give_back(self) -> None:
        """Put the sums in place of the gradients, rounded once."""
        for p, kept in zip(self._parameters, self._sums, strict=True):
            p.grad = None if kept is None else kept.to(p.dtype)


def _initialize(stage: Stage, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    with _quiet():
        engine, *_ = _deepspeed().initialize(model=stage, optimizer=optimizer, config=settings)
    return engine


def _deepspeed() -> Any:
    """DeepSpeed, without the shared-memory operation it would compile for a minute on a CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        import deepspeed
        import deepspeed.ops

        if ranks.device().type == "cpu":
            deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed logs hundreds of lines at INFO and warns of optimizers that it hasn't tested."""
    import logging

    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(max(before, logging.WARNING))


def _facts(stage: Stage, frozen: set[str]) -> dict[str, TensorFacts]:
    """Facts of parameters and persistent buffers, in the order of the module's state."""
    parameters = dict(stage.named_parameters())
    facts = {}
    for name, value in stage.state_dict().items():
        if name in parameters:
            facts[name] = TensorFacts(tuple(value.shape), "frozen" if name in frozen else "parameter", "float32")
        else:
            facts[name] = TensorFacts(tuple(value.shape), "buffer", str(value.dtype).removeprefix("torch."))
    return facts


def _weight(batch: Batch) -> float:
    return float(batch.weight.sum())


def _suspects(batches: Sequence[Batch]) -> tuple[int, ...]:
    """Ids of all ranks' present samples of these batches; collective."""
    mine = [
        int(i) for batch in batches for i, w in zip(batch.ids.tolist(), batch.weight.tolist(), strict=True) if w > 0
    ]
    return tuple(sorted({i for theirs in ranks.gather(mine) for i in theirs}))


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _as(like: Tensor, flag: bool) -> Tensor:
    return torch.tensor(float(flag), dtype=like.dtype, device=like.device)
