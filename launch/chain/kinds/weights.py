"""Naming weights in a step: of a run, or of any file in any format."""

from __future__ import annotations

from typing import Any, Literal

from pipeline.config import Config


class WeightsConfig(Config):
    """Where weights come from."""

    source: str  # a run directory, one checkpoint's folder, or a weight file or folder
    format: str | None = None  # the weights' format; None: our own, or a run
    known: dict[str, Any] = {}  # what tensors don't tell, such as heads: 12
    weights: Literal["auto", "ema", "raw"] = "auto"  # of a run: auto is the moving average where it keeps one
