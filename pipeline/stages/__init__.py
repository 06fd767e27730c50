"""The stages there are, by the name a configuration gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pipeline.config import by_dotted_name, entry_of

if TYPE_CHECKING:
    from pipeline.stages.base import Stage

STAGES: dict[str, str] = {
    "mae": "pipeline.stages.mae:MaeStage",
    "mp3": "pipeline.stages.mp3:Mp3Stage",
    "flip": "pipeline.stages.flip:FlipStage",
    "classify": "pipeline.stages.classify:ClassifyStage",
    "probe": "pipeline.stages.probe:ProbeStage",
    "vitdet": "pipeline.stages.vitdet:VitDetStage",
    "segment": "pipeline.stages.segment:SegmentStage",
    "sam": "pipeline.stages.sam:SamStage",
}
"""Where each stage's class is; imported by `stage_class`, so that one stage's libraries don't slow another's start."""


def stage_class(name: str, *, where: str = "stage") -> type[Stage]:
    """The class of stage `name`.

    Raises:
        ConfigError: there is no such stage; names the nearest.
    """
    return cast("type[Stage]", by_dotted_name(entry_of(STAGES, name, what="stage", where=where), where=where))
