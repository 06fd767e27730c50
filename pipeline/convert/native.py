"""Our own weights in one safetensors file that says which stage they are and how it is built."""

from __future__ import annotations

from typing import ClassVar

from pipeline.config import Config, Document, validate
from pipeline.convert.weights import Format, Known, WeightFile, Weights, Written, checked_options
from pipeline.errors import CheckpointError


class NativeHeader(Config):
    """What stands beside the tensors."""

    format_version: int
    stage: str
    options: Document
    classes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("",)


class Native(Format):
    """Names as in our checkpoints; `init_from` takes such a file too."""

    name: ClassVar[str] = "vitrail"
    takes: ClassVar[tuple[str, ...]] = ()
    config_file: ClassVar[str | None] = "config.json"
    pickles: ClassVar[bool] = False
    version: ClassVar[int] = 1

    def read(self, source: WeightFile, known: Known) -> Weights:
        if "format_version" not in source.config:
            raise CheckpointError(
                "it doesn't say which stage it holds", where=source.where, fix="give its format, or the run directory"
            )
        header = validate(NativeHeader, source.config, where=f"header of {source.where}")
        if header.format_version != self.version:
            raise CheckpointError(
                f"it has format version {header.format_version}", where=source.where, fix="use a newer vitrail"
            )
        return Weights(source.where, header.stage, header.options, source.state, header.classes, header.parts)

    def write(self, weights: Weights, known: Known) -> Written:
        # Every option is written out, so that a file means the same when a default changes.
        _, options = checked_options(weights)
        header = {
            "format_version": self.version,
            "stage": weights.stage,
            "options": options.model_dump(mode="json"),
            "classes": list(weights.classes),
            "parts": list(weights.parts),
        }
        return Written(weights.state, header, ())
