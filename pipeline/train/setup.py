"""What a run is made from, put together before anything is built: its configuration, directory and data."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from pipeline import config as configs
from pipeline import ranks
from pipeline.classes import learnt_classes
from pipeline.config import Config
from pipeline.run_dir import RunDir, command_line
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts, Stage, seeded_init
from pipeline.train.changes import check_unchanged
from pipeline.train.config import TrainConfig
from pipeline.train.data import RunData, describe, read_data
from pipeline.train.resolve import Resolved, resolve

log = logging.getLogger("vitrail")


class RunSetup(NamedTuple):
    """A run that has passed every check and hasn't begun yet; the same on all ranks."""

    config: TrainConfig
    run_dir: RunDir
    resolved: Resolved
    options: Config  # the stage's
    data: RunData

    @property
    def checkpoints_url(self) -> str:
        """The checkpoints folder."""
        return self.config.checkpoint.url or self.run_dir.checkpoints_url

    def build_stage(self) -> Stage:
        """The stage with its initial weights, the same on all ranks."""
        seeded_init(self.config.seed)
        classes_of_sets = {name: manifest.classes for name, manifest in self.data.sets.items()}
        facts = DataFacts(self.data.classes, self.data.num_samples, classes_of_sets)
        return stage_class(self.config.stage)(self.options, facts)

    def checkpoint_info(self, stage: Stage) -> dict[str, Any]:
        """What a checkpoint says about its run: what people read, and what later runs compare with their own."""
        config = self.config.model_dump(mode="json")
        return {
            "stage": self.config.stage,
            "name": self.config.name,
            "options": config["options"],
            "train": config["data"]["train"],
            "classes": list(learnt_classes(stage)),
            "trunk": stage.trunk.config.model_dump(mode="json"),
            "text": text_options(stage),
            "zero_stage": self.resolved.zero_stage,
            "precision": self.resolved.precision,
            "ema": None if self.config.ema is None else self.config.ema.model_dump(mode="json"),
            "data": self.data.identity(),
        }


def prepare_run(config: TrainConfig) -> RunSetup:
    """Check a configuration against the run directory, the machine and the data, and make the directory ready.

    Collective; nothing is written until every check has passed.

    Raises:
        ConfigError: the configuration doesn't fit the stage, the ranks, the data, or the run that is to be resumed.
        DataError, StorageError: see `read_data`.
    """
    run_dir = RunDir(config.run_url)
    document = config.model_dump(mode="json")
    cls = stage_class(config.stage)
    ranks.from_first(lambda: check_unchanged(run_dir, document, cls.options_class))
    resolved = resolve(config, ranks.world(), ranks.device())
    options = configs.validate(cls.options_class, config.options, where=config.name, prefix="options")
    data = read_data(config.data, ranks.world().size, config.stage, cls.label_use(options))
    if ranks.world().rank == 0:
        for line in [*resolved.lines(), *describe(data)]:
            log.info("%s", line)
    ranks.from_first(lambda: run_dir.prepare(document, resolved.document(), command_line()))
    return RunSetup(config, run_dir, resolved, options, data)


def text_options(stage: Stage) -> dict[str, Any]:
    """Of a stage with a text tower; {} for others."""
    options = stage.text_options
    return {} if options is None else dict(options.model_dump(mode="json"))
