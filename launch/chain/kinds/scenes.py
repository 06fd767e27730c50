"""Rendered scenes: raw pairs for demos and tests."""

from __future__ import annotations

from typing import Any

from launch.chain.kinds.base import ChainFolders, StepKind
from launch.stopping import StopRequest
from pipeline import config as configs
from pipeline import storage
from pipeline.config import Document


class ScenesStep(StepKind):
    """Renders scenes; its document is a `ScenesConfig`."""

    def output(self, name: str, document: Document, folders: ChainFolders) -> str:
        return storage.join(folders.store, "raw", name)

    def run(self, document: Document, *, where: str, output: str, stop: StopRequest) -> dict[str, Any]:
        from data_prep.scenes.render import ScenesConfig, write_scenes

        config = configs.validate(ScenesConfig, document, where=where)
        return write_scenes(config, output)._asdict()
