"""What the portability tests run on every rank: real checkpoints from one layout, taken over on another."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.errors import StorageError
from pipeline.train.checkpoints import commits
from pipeline.train.checkpoints.restore import load_newest
from pipeline.train.checkpoints.saving import CheckpointWriter
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine
from tests.support import engine_cases as cases

OPTIONS = {"freeze": "trunk.patch_embed", "memory": True}
GLOBAL_BATCH = 12  # which worlds of 1, 2 and 3 share equally


def build(zero_stage: int, precision: str) -> DeepSpeedEngine:
    return cases.build(zero_stage, precision, options=OPTIONS, ema=cases.EMA, **cases.EMA_OPTIM)


def train(engine: DeepSpeedEngine, start: int, stop: int) -> None:
    for step in range(start, stop):
        assert engine.step(cases.micro_batches(step, 1, GLOBAL_BATCH), lr=1e-2).applied


def save(engine: DeepSpeedEngine, url: str) -> None:
    attempt = ranks.from_first(partial(commits.begin_attempt, url, 0, enforced=True))
    assert attempt is not None
    checkpoints = CheckpointWriter(url, attempt, keep_last=1, keep_every_samples=None, info={"ema": {}})
    checkpoints.finish(3, list(engine.snapshot()), engine.facts(), {"step": 3, "samples": 3})
    checkpoints.close()


def values(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Masters and averages, whole."""
    state = cases.whole(engine)
    both = {
        f"{name}/{key}": tensors[key]
        for name, (tensors, _) in state.items()
        for key in ("value", "ema")
        if key in tensors
    }
    return both if ranks.world().rank == 0 else {}


def source(zero_stage: int, precision: str, url: str) -> tuple[dict[str, Tensor], str]:
    """Three steps, a checkpoint, three more: values and digest at the end."""
    engine = build(zero_stage, precision)
    with torch.no_grad():
        for name, buffer in engine.stage.named_buffers():
            if name == "memory":
                buffer.copy_(torch.arange(7.0) / 4)
            elif name == "count":
                buffer.fill_(12345678901)
    train(engine, 0, 3)
    save(engine, url)
    train(engine, 3, 6)
    outcome = values(engine), cases.digest(cases.whole(engine))
    engine.close()
    return outcome


def target(zero_stage: int, precision: str, url: str, again: str) -> tuple[dict[str, Tensor], str]:
    """Take over the checkpoint at `url`, save it to `again`, and do the three more steps."""
    engine = build(zero_stage, precision)
    train(engine, 50, 51)  # a state of its own, which has to be replaced
    loaded = load_newest(url, engine.wanted(), engine.facts())
    assert loaded is not None
    engine.restore(loaded[1])
    save(engine, again)
    train(engine, 3, 6)
    outcome = values(engine), cases.digest(cases.whole(engine))
    engine.close()
    return outcome


def save_where_rank_1_cannot(url: str) -> tuple[int, str, float]:
    """Saves of steps 1 and 2, where rank 1 can't write step 1: failures, how the last save ended, seconds it took."""
    from pipeline import storage
    from pipeline.train.checkpoints import saving

    engine = build(2, "fp32")
    attempt = ranks.from_first(partial(commits.begin_attempt, url, 0, enforced=True))
    assert attempt is not None
    checkpoints = CheckpointWriter(url, attempt, keep_last=2, keep_every_samples=None, info={"ema": {}})
    real, patience = storage.write, saving.ATTEMPTS_PER_WRITE

    def failing(path: str, data: Any) -> None:
        if "rank-00001" in path and "step-000000000001" in path:
            raise StorageError("no answer", where=path, fix="wait")
        real(path, data)

    storage.write, saving.ATTEMPTS_PER_WRITE = failing, 1
    began = time.monotonic()
    try:
        checkpoints.save(1, list(engine.snapshot()), engine.facts(), {"step": 1, "samples": 1})
        checkpoints.finish(2, list(engine.snapshot()), engine.facts(), {"step": 2, "samples": 2})
    finally:
        storage.write, saving.ATTEMPTS_PER_WRITE = real, patience
        checkpoints.close()
        engine.close()
    return checkpoints.num_failed, str(checkpoints._last_failure), time.monotonic() - began


def two_checkpoints(url: str) -> None:
    """Checkpoints of steps 3 and 6 in one attempt."""
    engine = build(2, "fp32")
    attempt = ranks.from_first(partial(commits.begin_attempt, url, 0, enforced=True))
    assert attempt is not None
    checkpoints = CheckpointWriter(url, attempt, keep_last=2, keep_every_samples=None, info={"ema": {}})
    for step in (3, 6):
        train(engine, step - 3, step)
        state = {"step": step, "samples": step * GLOBAL_BATCH}
        if step == 3:
            checkpoints.save(step, list(engine.snapshot()), engine.facts(), state)
            checkpoints.wait_copied()
        else:
            checkpoints.finish(step, list(engine.snapshot()), engine.facts(), state)
    checkpoints.close()
    engine.close()
