"""The report on runs and data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.chain.kinds.base import ChainFolders, StepKind
from launch.stopping import StopRequest
from pipeline import config as configs
from pipeline import storage
from pipeline.config import Document


class ReportStep(StepKind):
    """Writes a report; its document is a `ReportSpec`."""

    def output(self, name: str, document: Document, folders: ChainFolders) -> str:
        return str(folders.work / name)

    def run(self, document: Document, *, where: str, output: str, stop: StopRequest) -> dict[str, Any]:
        from pipeline.report.html import write_report
        from pipeline.report.spec import ReportSpec

        spec = configs.validate(ReportSpec, document, where=where)
        if not storage.is_remote(output):
            Path(output).mkdir(parents=True, exist_ok=True)
        return {"report": write_report(spec, output)}
