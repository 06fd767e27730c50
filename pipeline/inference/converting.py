"""Translating weights between formats, a run's among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline import convert as formats
from pipeline.convert import Saved
from pipeline.convert.loading import LoadReport
from pipeline.convert.weights import Format, Weights, load_table
from pipeline.errors import ConfigError
from pipeline.inference.loading import NATIVE, check_known, is_run, run_weights


class Conversion(NamedTuple):
    """What was read, and what was written of it."""

    weights: Weights  # without their tensors
    table: LoadReport  # what became of each name in reading
    saved: Saved
    format: str  # that was written

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "source": self.weights.where,
            "stage": self.weights.stage,
            "options": self.weights.options,
            "weights": self.weights.description,
            **self.table._asdict(),
            "dropped": list(self.saved.dropped),
            "num_written": self.saved.num_tensors,
            "written": self.saved.files,
        }


def convert(
    source: str,
    target: str,
    format: str,
    *,
    source_format: str | None = None,
    known: Mapping[str, Any] = {},
    weights: str = "auto",
) -> Conversion:
    """Read weights, of a file or of a run's newest checkpoint, and write them in another format.

        >>> vitrail.convert("runs/mae", "vit.safetensors", "timm").saved.files
        ['vit.safetensors']

    Args:
        source: a run directory, one checkpoint's folder, or a weight file or folder; local or s3://.
        target: the file to write, or a folder for formats with a config.json.
        format: to write, one of `pipeline.convert.FORMATS`.
        source_format: None for a run or our own format.
        known: what the tensors can't tell, such as {"heads": 12}; see `pipeline.convert.weights.Known`.
        weights: of a run: "ema" for the moving average, "raw" as trained, "auto": the average where there is one.

    Raises:
        CheckpointError: the source can't be read.
        ConfigError: a format or a fact is wrong or missing, or the target can't express the model.
        StorageError: the target can't be written.
    """
    read_as = formats.format_named(source_format or NATIVE)
    write_as = formats.format_named(format)
    check_known(known, read_as, write_as)  # what means something on one side is fine
    if target.rstrip("/") == source.rstrip("/"):
        raise ConfigError("it would overwrite what it reads", where=target, fix="write to another place")
    if is_run(source):
        if read_as.name != NATIVE:
            raise ConfigError("that is a run directory of ours", where=source, fix="leave source_format out")
        read = run_weights(source, weights)
    elif weights != "auto":
        raise ConfigError("only a run keeps a moving average", where=source, fix="leave weights out")
    else:
        read = formats.read(source, read_as.name, **_taken(known, read_as))
    table = load_table(read)
    saved = formats.save(read, target, write_as.name, **_taken(known, write_as))
    return Conversion(read._replace(where=source, state={}), table, saved, write_as.name)


def _taken(known: Mapping[str, Any], form: Format) -> dict[str, Any]:
    return {name: value for name, value in known.items() if name in form.takes}
