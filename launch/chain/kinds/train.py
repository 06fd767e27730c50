"""Training runs, whose ranks the chain's own process starts on worker groups and watches."""

from __future__ import annotations

from launch.chain.kinds.base import ChainFolders, StepKind
from pipeline import config as configs
from pipeline import storage
from pipeline.config import Document


class TrainStep(StepKind):
    """Trains one stage; its document is a `TrainConfig`."""

    trained_by_ranks = True

    def output(self, name: str, document: Document, folders: ChainFolders) -> str:
        return str(folders.work / "runs" / name)

    def complete(self, name: str, document: Document, folders: ChainFolders) -> Document:
        runs = str(folders.work / "runs")
        defaults: Document = {}
        if storage.is_remote(folders.store):
            defaults["checkpoint"] = {"url": storage.join(folders.store, "checkpoints", name)}
        return {**configs.merge(defaults, document), "name": name, "runs": runs}

    def needs_ray(self, document: Document) -> bool:
        return True
