"""Evaluations and pictures of a stage while it trains."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline import ranks
from pipeline.data.batch import Batch
from pipeline.pictures.picture import Picture
from pipeline.stages.base import Stage
from pipeline.train.config import TrainConfig
from pipeline.train.data import RunData
from pipeline.train.engine.base import Engine
from pipeline.train.state import State
from pipeline.train.track import Tracker

PICTURE_BATCH = 16  # samples that pictures show


class Evaluator:
    """Runs every evaluation of the stage and saves figures, details and pictures. Collective.

    Args:
        data: the evaluation sets, and the training data, which evaluations may read as "train", without augmentation.
        tracker: rank 0's; None elsewhere.
    """

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        config: TrainConfig,
        data: RunData,
        tracker: Tracker | None,
    ) -> None:
        self._stage = stage
        self._engine = engine
        self._config = config
        self._data = data
        self._names = tuple(data.sets)
        self._tracker = tracker
        ema = config.ema
        self._kinds = ("raw",) if ema is None else ("ema", "raw") if ema.evaluate == "both" else (ema.evaluate,)

    def __call__(self, state: State) -> dict[str, float]:
        """Evaluate now; the figures, which are the same on all ranks."""
        figures: dict[str, float] = {}
        details: dict[str, Any] = {}
        pictures: list[Picture] = []
        for kind in self._kinds:
            suffix = "" if kind == self._kinds[0] else f"_{kind}"
            with self._engine.averaged() if kind == "ema" else contextlib.nullcontext():
                for evaluation in self._stage.evaluations().values() if self._names else ():
                    measured = evaluation(self._engine.predict, self.sweep, self._names)
                    figures.update({f"{name}{suffix}": value for name, value in measured.items()})
                    details.update({f"{name}{suffix}": value for name, value in measured.details.items()})
                pictures = pictures or self._pictures()
        if self._tracker is not None:
            self._tracker.evaluated(state.step, state.samples, figures, details, weights=self._kinds[0])
            self._tracker.pictures(state.step, [(p.title, [(c, _png(i)) for c, i in p.panels]) for p in pictures])
        ranks.barrier()
        return figures

    def sweep(self, name: str) -> Iterator[Batch]:
        """A rank's share of one pass over the named set; see `pipeline.evaluate.base.Sweep`."""
        return iter(self._sweep(name, self._config.data.evaluate_batch, self._config.data.loader_workers))

    def _sweep(self, name: str, batch: int, workers: int) -> Iterable[Batch]:
        transform = self._stage.transform(train=False)
        return self._data.sweep(name, transform, ranks.world(), seed=self._config.seed, batch=batch, workers=workers)

    def _pictures(self) -> list[Picture]:
        """Pictures of the first samples of the first evaluation set, on rank 0."""
        if not self._names:
            return []
        batch = next(iter(self._sweep(self._names[0], PICTURE_BATCH, 0)), None)
        if batch is None:
            return []
        predictions = self._engine.predict(batch)
        return self._stage.pictures(batch, predictions) if self._tracker is not None else []


def _png(image: Any) -> bytes:
    """A [3,H,W] uint8 tensor as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
