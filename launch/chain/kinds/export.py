"""Exporting Segment Anything as ONNX graphs."""

from __future__ import annotations

from typing import Any

from launch.chain.kinds.base import ChainFolders, StepKind
from launch.chain.kinds.weights import WeightsConfig
from launch.stopping import StopRequest
from pipeline import config as configs
from pipeline import storage
from pipeline.config import Document


class ExportStep(StepKind):
    """Writes graphs into a folder, checked against the model; its document is a `WeightsConfig`."""

    def output(self, name: str, document: Document, folders: ChainFolders) -> str:
        return storage.join(folders.store, "exports", name)

    def run(self, document: Document, *, where: str, output: str, stop: StopRequest) -> dict[str, Any]:
        from pipeline.inference.exporting import export
        from pipeline.inference.loading import read_source_weights

        config = configs.validate(WeightsConfig, document, where=where)
        weights = read_source_weights(config.source, config.format, config.known, config.weights)
        return export(weights, output).document()
