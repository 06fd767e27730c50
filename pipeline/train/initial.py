"""Weights that a run begins with: those of `init_from`, as far as `init_prefixes` reaches."""

from __future__ import annotations

import logging

from torch import Tensor

from pipeline import ranks
from pipeline.classes import check_initial, recorded_classes
from pipeline.convert.loading import check_same_text, check_same_trunk, load_initial, reaches
from pipeline.stages.base import Stage
from pipeline.train.checkpoints.commits import find_commits
from pipeline.train.checkpoints.restore import read_info, read_saved
from pipeline.train.config import TrainConfig
from pipeline.train.setup import text_options

log = logging.getLogger("vitrail")


def initialize_weights(stage: Stage, config: TrainConfig, checkpoints_url: str) -> str:
    """Copy `init_from`'s weights into a stage that was just built, unless the run has state to resume. Collective.

    Returns:
        Where the weights come from, for people.

    Raises:
        CheckpointError: there are no such weights, or they don't fit the stage.
    """
    source = config.init_from
    if source is None or config.resume_from is not None:
        return "scratch"
    commits, skipped = ranks.from_first(lambda: find_commits(checkpoints_url))
    if commits or skipped:
        return "scratch"
    info, prefixes = ranks.from_first(lambda: read_info(source)), config.init_prefixes
    if reaches(prefixes, "trunk."):
        check_same_trunk(stage.trunk.config.model_dump(mode="json"), info.get("trunk", {}), where=source)
    if reaches(prefixes, "text."):
        check_same_text(text_options(stage), info.get("text", {}), where=source)
    weights, description = _read_weights(source, config)
    check_initial(stage, weights, recorded_classes(info), prefixes, where=source)
    report = load_initial(stage, weights, prefixes, where=source)
    if ranks.world().rank == 0:
        for line in [f"{description} from {source}", *report.lines()]:
            log.info("%s", line)
    return f"init_from {source}"


def _read_weights(source: str, config: TrainConfig) -> tuple[dict[str, Tensor], str]:
    """The weights, read by rank 0 alone and sent tensor by tensor, and what they are, in words."""
    tensors: dict[str, Tensor] = {}

    def read() -> str:
        saved = read_saved(source, config.init_weights)
        tensors.update(saved.tensors)
        return saved.describe()

    description = ranks.from_first(read)
    return ranks.broadcast_tensors(tensors), description
