"""Translating weights to another project's format."""

from __future__ import annotations

from typing import Any

from launch.chain.kinds.base import ChainFolders, StepKind
from launch.chain.kinds.weights import WeightsConfig
from launch.stopping import StopRequest
from pipeline import config as configs
from pipeline import storage
from pipeline.config import Document

_FILE_FORMAT = "vitrail"


class ConvertConfig(WeightsConfig):
    """Which weights are written in which format, and where."""

    to: str = _FILE_FORMAT  # a name of pipeline.convert's formats
    target: str  # the file to write, or a folder for some formats


class ConvertStep(StepKind):
    """Writes weights in another format; its document is a `ConvertConfig`."""

    def output(self, name: str, document: Document, folders: ChainFolders) -> str:
        return str(document["target"])

    def complete(self, name: str, document: Document, folders: ChainFolders) -> Document:
        return {"target": self._default_target(name, document, folders), **document}

    def may_delete(self, name: str, document: Document, folders: ChainFolders) -> bool:
        return str(document["target"]) == self._default_target(name, document, folders)

    def run(self, document: Document, *, where: str, output: str, stop: StopRequest) -> dict[str, Any]:
        from pipeline.inference.converting import convert

        config = configs.validate(ConvertConfig, document, where=where)
        conversion = convert(
            config.source,
            output,
            config.to,
            source_format=config.format,
            known=config.known,
            weights=config.weights,
        )
        return conversion.document()

    @staticmethod
    def _default_target(name: str, document: Document, folders: ChainFolders) -> str:
        """One file of our own format; of others a folder, which every format can be written to or into."""
        ours = document.get("to", _FILE_FORMAT) == _FILE_FORMAT
        return storage.join(folders.store, "weights", f"{name}.safetensors" if ours else name)
