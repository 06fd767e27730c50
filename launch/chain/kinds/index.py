"""Existing tars made a data set as they are."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from launch.chain.kinds.base import ChainFolders, StepKind
from launch.stopping import StopRequest
from pipeline import config as configs
from pipeline import storage
from pipeline.config import Config, Document


class IndexConfig(Config):
    """The tars, and where their manifest goes."""

    url: str  # folder of the tars; s3:// too
    to: str  # folder for manifest and indices; a chain's own by default, so that the tars' folder may be read-only
    match: str = "*"  # only tars with such names
    classes: str | None = None  # a JSON list, names of the labels 0, 1, ...
    skip_bad: bool = False  # leave out tars that can't be used
    readers: int = Field(default=8, gt=0)  # tars read at a time


class IndexStep(StepKind):
    """Indexes tars; its document is an `IndexConfig`."""

    def output(self, name: str, document: Document, folders: ChainFolders) -> str:
        return str(document["to"])

    def complete(self, name: str, document: Document, folders: ChainFolders) -> Document:
        return {"to": self._default_output(name, folders), **document}

    def may_delete(self, name: str, document: Document, folders: ChainFolders) -> bool:
        return str(document["to"]) == self._default_output(name, folders)

    def run(self, document: Document, *, where: str, output: str, stop: StopRequest) -> dict[str, Any]:
        import logging

        from launch.index import index_dataset

        config = configs.validate(IndexConfig, document, where=where)
        summary, _ = index_dataset(
            config.url,
            to=config.to,
            match=config.match,
            classes=config.classes,
            skip_bad=config.skip_bad,
            workers=config.readers,
            stop=stop,
            say=logging.getLogger("vitrail").info,
        )
        return summary

    @staticmethod
    def _default_output(name: str, folders: ChainFolders) -> str:
        return storage.join(folders.store, "data", name)
