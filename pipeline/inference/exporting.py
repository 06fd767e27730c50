"""Exporting a trained stage as graphs that run without this code."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.convert.onnx import Exported, export_sam
from pipeline.convert.weights import Weights, build


class Export(NamedTuple):
    """Weights, and the graphs that were written of them."""

    weights: Weights  # without their tensors
    graphs: Exported

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "source": self.weights.where,
            "stage": self.weights.stage,
            "weights": self.weights.description,
            "written": list(self.graphs.files),
            "differences": self.graphs.differences,
        }


def export(weights: Weights, folder: str) -> Export:
    """Write ONNX graphs of weights of stage sam into a folder, after running them beside the model.

    Raises:
        CheckpointError: the weights don't fit their stage.
        ConfigError: see `export_sam`.
    """
    stage, _ = build(weights)
    return Export(weights._replace(state={}), export_sam(stage, folder))
