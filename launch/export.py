"""Exporting a trained stage as graphs that run without this code."""

from __future__ import annotations

from collections.abc import Sequence

from launch.look import Told
from launch.predict import read_weights_of
from pipeline.convert.onnx import export_sam
from pipeline.convert.weights import build


def export(
    source: str, target: str, *, source_format: str | None = None, known: Sequence[str] = (), which: str = "auto"
) -> Told:
    """Write ONNX graphs of `source`, of stage sam, into the folder `target`, after running them beside the model.

    Args:
        source: a run, a weight file of ours, or with `source_format` another project's.
        known: name=value items that the file's tensors don't tell.
        which: of a run's weights, see `run_weights`.

    Raises:
        CheckpointError: the source can't be read.
        ConfigError: see `export_sam`.
    """
    weights = read_weights_of(source, source_format, known, which)
    stage, _ = build(weights)
    done = export_sam(stage, target)
    told = ", ".join(f"{name} {found:.1e}" for name, found in done.differences.items())
    document = {
        "source": source,
        "stage": weights.stage,
        "weights": weights.told,
        "written": list(done.files),
        "differences": done.differences,
    }
    lines = [
        f"{weights.stage} from {source}, {weights.told}",
        f"largest differences from the model, over the largest values: {told}",
        f"written: {', '.join(done.files)}",
    ]
    return document, lines
