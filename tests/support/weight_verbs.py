"""The verbs on trained weights, as a command line of few words calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from launch import inference
from launch.replies import Reply, SourceFlags, mapping_of
from pipeline.inference.predicting import PredictRequest


def convert_weights(
    source: str, target: str, source_format: str | None, target_format: str, known: Sequence[str], which: str = "auto"
) -> Reply:
    return inference.convert(SourceFlags(source, source_format, known, which=which), target, target_format)


def evaluate(
    source: str,
    sets: Sequence[str],
    say: Callable[[str], None],
    *,
    source_format: str | None = None,
    known: Sequence[str] = (),
    settings: Sequence[str] = (),
    **options: Any,
) -> Reply:
    return inference.evaluate(SourceFlags(source, source_format, known, settings), sets, say, **options)


def predict(
    source: str,
    images: Sequence[str],
    out: str,
    say: Callable[[str], None],
    *,
    questions: Sequence[str] = (),
    source_format: str | None = None,
    known: Sequence[str] = (),
    settings: Sequence[str] = (),
    which: str = "auto",
    **request: Any,
) -> tuple[dict[str, Any], list[str], bool]:
    flags = SourceFlags(source, source_format, known, settings, which)
    return inference.predict(flags, images, out, PredictRequest(mapping_of(questions), **request), say)
