"""What the engine's tests run on every rank of a process group."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.data.batch import Batch
from pipeline.stages.base import DataFacts, Stage, seeded_init
from pipeline.train.config import EmaConfig, OptimConfig
from pipeline.train.engine.base import Fragment, Read
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.train.engine.ema import decay_after
from pipeline.train.optim import build_optimizer, parameter_groups
from tests.support.stages_for_tests import TinyOptions, TinyPair, TinyStage, make_batch

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, layer_decay=0.7, clip_grad=1.0)
Rows = list[tuple[str, int, int, dict[str, Tensor], dict[str, float]]]


def build(
    zero_stage: int,
    precision: str = "fp32",
    kind: str = "plain",
    options: dict[str, Any] | None = None,
    ema: EmaConfig | None = None,
    **optim: Any,
) -> DeepSpeedEngine:
    seeded_init(3)
    cls: type[Stage] = TinyPair if kind == "pair" else TinyStage
    stage = cls(TinyOptions(**(options or {})), DataFacts())
    config = OPTIM.model_copy(update=optim)
    return DeepSpeedEngine(
        stage,
        config,
        zero_stage=zero_stage,
        precision=precision,
        peak_lr=config.lr or 0.0,
        seed=1,  # type: ignore[arg-type]
        ema_decay=None if ema is None else lambda samples: decay_after(ema, samples, 16),
    )


def micro_batches(step: int, num_micro: int, global_batch: int = 16) -> list[Batch]:
    """This rank's share of global batch `step`, whose ids don't depend on world or micro batches."""
    world = ranks.world()
    mine = [step * global_batch + i for i in range(global_batch)][world.rank * global_batch // world.size :]
    mine = mine[: global_batch // world.size]
    size = len(mine) // num_micro
    return [make_batch(mine[k * size : (k + 1) * size], position=step * global_batch) for k in range(num_micro)]


def train(engine: DeepSpeedEngine, start: int, stop: int, num_micro: int = 1) -> list[Any]:
    return [engine.step(micro_batches(s, num_micro), lr=1e-2) for s in range(start, stop)]


def rows_of(engine: DeepSpeedEngine) -> Rows:
    return [
        (f.name, f.start, f.stop, {k: t.clone() for k, t in f.tensors.items()}, dict(f.group))
        for f in engine.snapshot()
    ]


def whole(engine: DeepSpeedEngine) -> dict[str, tuple[dict[str, Tensor], dict[str, float]]]:
    """Every tensor's full state, put together from all ranks' snapshots; every element must occur exactly once."""
    rows = [row for part in ranks.gather(rows_of(engine)) for row in part]
    state: dict[str, tuple[dict[str, Tensor], dict[str, float]]] = {}
    for name, facts in engine.facts().items():
        size = torch.Size(facts.shape).numel()
        of_tensor = [row for row in rows if row[0] == name]
        assert sum(stop - start for _, start, stop, _, _ in of_tensor) == size, name
        tensors = {key: torch.empty(size, dtype=t.dtype) for key, t in of_tensor[0][3].items()}
        for _, start, stop, parts, group in of_tensor:
            assert group == of_tensor[0][4], name
            for key, part in parts.items():
                tensors[key][start:stop] = part
        state[name] = (tensors, of_tensor[0][4])
    return state


def digest(state: dict[str, tuple[dict[str, Tensor], dict[str, float]]]) -> str:
    """One hash of a whole state."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensors, group = state[name]
        for key in sorted(tensors):
            total.update(f"{name} {key} {tensors[key].dtype}".encode() + tensors[key].numpy().tobytes())
        total.update(repr(sorted(group.items())).encode())
    return total.hexdigest()


def run(zero_stage: int, precision: str, kind: str, num_steps: int, num_micro: int, options: Any = None) -> Any:
    """Train from scratch; (results, whole state, its digest)."""
    engine = build(zero_stage, precision, kind, options)
    results = train(engine, 0, num_steps, num_micro)
    state = whole(engine)
    engine.close()
    return [tuple(r) for r in results], state, digest(state)


def reader(state: Any) -> Read:
    """Reads spans of a whole state."""

    def read(name: str, begin: int, end: int) -> Fragment:
        tensors, group = state[name]
        return Fragment(name, begin, end, {key: t[begin:end] for key, t in tensors.items()}, group)

    return read


def resume(state: Any, zero_stage: int, precision: str, kind: str, start: int, stop: int, options: Any = None) -> Any:
    """Restore a whole state and go on; (digest right after restoring, whole state at the end, its digest)."""
    engine = build(zero_stage, precision, kind, options)
    train(engine, 50, 51)  # state from another life, which restoring has to replace
    engine.restore(reader(state))
    restored = digest(whole(engine))
    visible = [t.float() for t in engine.predict(make_batch([1, 2, 3, 4])).values()]
    train(engine, start, stop)
    final = whole(engine)
    engine.close()
    return restored, final, digest(final), visible


def built_weights(options: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters as the stage was built, before any engine saw them."""
    seeded_init(3)
    return {name: p.detach().clone() for name, p in TinyStage(TinyOptions(**options), DataFacts()).named_parameters()}


def predict_from(state: Any, precision: str, kind: str, options: Any) -> list[Tensor]:
    """Predictions of a plain module with these weights, in fp32 or rounded to bf16."""
    cls: type[Stage] = TinyPair if kind == "pair" else TinyStage
    stage = cls(TinyOptions(**(options or {})), DataFacts())
    with torch.no_grad():
        for name, target in [*stage.named_parameters(), *stage.named_buffers()]:
            if name in state:
                target.copy_(state[name][0]["value"].view(target.shape))
        if precision == "bf16":
            for p in stage.parameters():
                p.data = p.data.bfloat16()
        stage.eval()
        return [t.float() for t in stage("predict", make_batch([1, 2, 3, 4])).values()]


def run_with_gap(zero_stage: int, precision: str, poison: int | None, kind: str = "plain") -> str:
    """Steps 0, 1, 2 where 1 is poisoned, or has a loss beyond the limit (poison 0), or steps 0 and 2."""
    engine = build(zero_stage, precision, kind, options={"poison": poison or -1})
    for step in (0, 1, 2):
        if poison is not None or step != 1:
            limit = 0.1 if step == 1 and poison == 0 else math.inf
            result = engine.step(micro_batches(step, 2), lr=1e-2, loss_limit=limit)
            assert result.applied == (step != 1)
            assert result.cause == ("" if result.applied else "spike" if poison == 0 else "loss")
            assert result.applied or set(result.suspects) <= set(range(16, 32))
    state = digest(whole(engine))
    engine.close()
    return state


def scale_after(zero_stage: int, precision: str, held: bool) -> float:
    """logit_scale's master after a step that began with it beyond its limit of 2."""
    engine = build(zero_stage, precision, "pair")
    if not held:
        engine.stage.limits = {}  # type: ignore[misc]
    for slot in engine._state.slots:
        if slot.name == "logit_scale":
            slot.master.fill_(2.5)
    engine.step(micro_batches(0, 1), lr=0.0)
    value = float(whole(engine)["logit_scale"][0]["value"])
    engine.close()
    return value


def frozen_before_and_after(options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    engine = build(3, "bf16", options=options)
    names = [name for name, facts in engine.facts().items() if facts.kind == "frozen"]
    assert names
    before = {name: whole_state[0]["value"].clone() for name, whole_state in whole(engine).items() if name in names}
    train(engine, 0, 2)
    after = {name: whole_state[0]["value"] for name, whole_state in whole(engine).items() if name in names}
    engine.close()
    return before, after


def absent_samples() -> tuple[list[float], list[float]]:
    """Losses of a batch in which ids 6, 13 are absent, and of their mean computed by hand."""
    engine = build(2)
    ours = engine.step(micro_batches(0, 2), lr=0.0)
    seeded_init(3)
    stage = TinyStage(TinyOptions(), DataFacts())
    present = make_batch([i for i in range(16) if i % 7 != 6])
    with torch.no_grad():
        expected = float(stage.loss(present).total) / len(present)
    engine.close()
    return [ours.loss, ours.parts["cross_entropy"]], [expected, expected]


def all_absent() -> tuple[bool, bool]:
    engine = build(2)
    before = digest(whole(engine))
    result = engine.step([make_batch([6, 13])], lr=1e-2)
    after = digest(whole(engine))
    engine.close()
    return result.applied, before != after


def stop_votes() -> list[bool]:
    engine = build(1)
    votes = [engine.step(micro_batches(s, 1), 1e-3, stop=s == 1 and ranks.world().rank == 1).stop for s in range(2)]
    engine.close()
    return votes


def other_optimizer(name: str) -> tuple[str, str, list[str]]:
    engine = build(0, "bf16", name=name, layer_decay=1.0)
    train(engine, 0, 2)
    state = whole(engine)
    train(engine, 2, 4)
    straight = digest(whole(engine))
    engine.close()
    engine = build(0, "bf16", name=name, layer_decay=1.0)
    engine.restore(reader(state))
    train(engine, 2, 4)
    resumed = digest(whole(engine))
    engine.close()
    return straight, resumed, sorted(state["head.weight"][0])


EMA = EmaConfig(half_life_samples=100, rampup_ratio=0.5)
EMA_OPTIM = {"eps": 1e-3}  # damps the noise of gradients that are zero but for rounding, which Adam would magnify


def averaged_over_a_resume(zero_stage: int, precision: str, options: Any, num_steps: int) -> Any:
    """Half of the steps, then the rest on a new engine: (whole state, forward under the average, same forward before
    and after it, snapshot before and after it).
    """
    engine = build(zero_stage, precision, options=options, ema=EMA, **EMA_OPTIM)
    train(engine, 0, num_steps // 2)
    state = whole(engine)
    engine.close()
    engine = build(zero_stage, precision, options=options, ema=EMA, **EMA_OPTIM)
    engine.restore(reader(state))
    train(engine, num_steps // 2, num_steps)
    before, batch = whole(engine), make_batch([1, 2, 3, 4])
    logits = [engine.predict(batch)["logits"].float()]
    with engine.averaged():
        averaged = engine.predict(batch)["logits"].float()
    logits.append(engine.predict(batch)["logits"].float())
    after = digest(whole(engine))
    engine.close()
    return before, averaged, logits, (digest(before), after)


def averaged_by_timm(num_steps: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same training in plain torch on one process, with timm's average: its state, and its logits."""
    from timm.utils import ModelEmaV3

    seeded_init(3)
    stage = TinyStage(TinyOptions(), DataFacts())
    config = OPTIM.model_copy(update=EMA_OPTIM)
    optimizer = build_optimizer(parameter_groups(stage, config), config, 1e-2)
    average = ModelEmaV3(stage)
    for step in range(num_steps):
        batch = make_batch(list(range(step * 16, step * 16 + 16)), position=step * 16)
        optimizer.zero_grad()
        (stage("loss", batch).total / batch.weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), config.clip_grad)
        optimizer.step()
        average.decay = 0.5 ** (16 / min(100, 0.5 * (step * 16 + 16)))
        average.update(stage)
    module = average.module.eval()
    with torch.no_grad():
        logits = module("predict", make_batch([1, 2, 3, 4]))["logits"]
    return dict(module.state_dict()), logits


def averages_followed(zero_stage: int, precision: str, options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our average, and timm's of a plain module that is given the masters and buffers after each step."""
    from timm.utils import ModelEmaV3

    engine = build(zero_stage, precision, options=options, ema=EMA)

    def copied() -> dict[str, Tensor]:
        return {n: s[0]["value"].view(engine.facts()[n].shape).float() for n, s in whole(engine).items()}

    plain = TinyStage(TinyOptions(**options), DataFacts())
    plain.load_state_dict(copied())
    average = ModelEmaV3(plain)
    for step in range(5):
        train(engine, step, step + 1)
        plain.load_state_dict(copied())
        average.decay = decay_after(EMA, step * 16, 16)
        average.update(plain)
    ours = {name: state[0].get("ema", state[0]["value"]) for name, state in whole(engine).items()}
    engine.close()
    return ours, {name: value.view(-1) for name, value in average.module.state_dict().items()}


def wrapper(zero_stage: int, precision: str) -> str:
    """Class of the optimizer DeepSpeed made."""
    engine = build(zero_stage, precision)
    name = type(engine._ds.optimizer).__name__
    engine.close()
    return name
