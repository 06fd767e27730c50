"""How far a training run is, read from its run directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.run_dir import RunDir

_HEADLINES = (
    "/top1",
    "/zeroshot_top1",
    "/knn_top1",
    "/reconstruction_mse",
    "_i2t_r1",
    "_t2i_r1",
    "/box_ap",
    "/mask_ap",
    "/iou_clicks_1",
    "/iou_clicks_9",
)


class AttemptWatcher:
    """Notices when a run begins a new attempt."""

    def __init__(self, run_url: str) -> None:
        self._run = RunDir(run_url)
        self._known = self._run.status().get("attempt")

    def newly_begun(self) -> str:
        """What a new attempt started from; "" when none has begun since the last call."""
        status = self._run.status()
        attempt = status.get("attempt")
        if attempt is None or attempt == self._known:
            return ""
        self._known = attempt
        return f"attempt {attempt}, from {status.get('resumed_from', 'scratch')}"


class StepProgress(NamedTuple):
    """How far something is."""

    text: str = ""  # "" before there is anything to say
    done: int = 0
    total: int = 0  # 0 where it isn't known


def training_progress(run_url: str) -> StepProgress:
    """Samples trained on so far, and a line such as "step 120, 30720 of 122880 samples, loss 0.612, 410 samples/s"."""
    try:
        run = RunDir(run_url)
        status = run.status()
        metrics = run.metrics()
    except (FileNotFoundError, ValueError, UserError):
        return StepProgress()
    trained = [line for line in metrics if line.get("kind") == "train"]
    if not trained:
        return StepProgress()
    last = trained[-1]
    length = int(status.get("length_samples", 0))
    parts = [f"step {last['step']}", f"{last['samples']} of {length or '?'} samples"]
    if "loss" in last:
        parts.append(f"loss {last['loss']:.4g}")
    if "samples_per_s" in last:
        parts.append(f"{last['samples_per_s']:.0f} samples/s")
    return StepProgress(", ".join(parts), int(last["samples"]), length)


def headline(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures to show where there is room for few: one per question, without its variants."""
    chosen = {name: value for name, value in figures.items() if name.endswith(_HEADLINES)}
    return chosen or dict(figures)
