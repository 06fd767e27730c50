"""A checkpoint of any ZeRO stage and world size goes on at any other, with nothing lost or changed.

Compared is the canonical state that is read from the files: masters, moments, averages, step counts, learning rate,
decay and scale of each group, buffers, frozen parameters.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from pipeline.train.checkpoints.restore import read_state, state_digest
from tests.support import portability_cases as cases
from tests.support.process_group import ProcessGroup


class Layout(NamedTuple):
    zero_stage: int
    world: int
    precision: str = "fp32"


ALL = [Layout(stage, world) for stage in (0, 1, 2, 3) for world in (1, 2, 3)]
# Each stage and each world twice or more as source and as target, each way between stages that store state unlike.
REPRESENTATIVE = [
    (Layout(*a), Layout(*b))
    for a, b in [
        ((0, 1), (3, 3)),
        ((3, 3), (0, 1)),
        ((0, 2), (1, 3)),
        ((1, 3), (2, 2)),
        ((2, 2), (3, 1)),
        ((3, 1), (2, 3)),
        ((2, 3), (0, 2)),
        ((1, 1), (3, 2)),
        ((3, 2), (1, 1)),
        ((2, 1), (1, 2)),
        ((0, 3), (2, 1)),
        ((3, 2), (3, 2)),
    ]
]
MIXED = [
    (Layout(2, 2, "bf16"), Layout(3, 1, "fp32")),
    (Layout(3, 3, "fp32"), Layout(0, 2, "bf16")),
    (Layout(1, 2, "bf16"), Layout(2, 3, "bf16")),
]


class Source(NamedTuple):
    url: str
    digest: str  # of the checkpoint's canonical state
    values: dict[str, Tensor]  # three steps later
    final: str


class Trial:
    """Runs sources once each and targets on demand, on groups that are started once."""

    def __init__(self, folder: Path, groups: dict[int, ProcessGroup]) -> None:
        self._folder = folder
        self._groups = groups
        self._sources: dict[Layout, Source] = {}
        self._number = itertools.count()

    def source(self, layout: Layout) -> Source:
        if layout not in self._sources:
            url = str(self._folder / f"source-{next(self._number)}")
            group = self._groups[layout.world]
            values, final = group.run(cases.source, layout.zero_stage, layout.precision, url)[0]
            self._sources[layout] = Source(url, state_digest(read_state(url)), values, final)
        return self._sources[layout]

    def check(self, origin: Layout, goal: Layout) -> None:
        source = self.source(origin)
        again = str(self._folder / f"target-{next(self._number)}")
        run = self._groups[goal.world].run
        values, final = run(cases.target, goal.zero_stage, goal.precision, source.url, again)[0]
        assert state_digest(read_state(again)) == source.digest, f"{origin} -> {goal}: the state changed on the way"
        if origin == goal:
            assert final == source.final, f"{goal}: not bit-equal on the same layout"
        elif origin.precision == goal.precision == "fp32":
            for name, value in source.values.items():
                worst = float((values[name] - value).abs().max())
                assert worst <= 1e-5, f"{origin} -> {goal}: {name} is off by {worst:.2g} after three steps"


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory, one: ProcessGroup, two: ProcessGroup, three: ProcessGroup) -> Trial:
    return Trial(tmp_path_factory.mktemp("pairs"), {1: one, 2: two, 3: three})


def test_twelve_representative_pairs(trial: Trial) -> None:
    for origin, goal in REPRESENTATIVE:
        trial.check(origin, goal)


def test_a_checkpoint_moves_between_precisions(trial: Trial) -> None:
    for origin, goal in MIXED:
        trial.check(origin, goal)


def test_the_state_holds_all_there_is(trial: Trial) -> None:
    state = read_state(trial.source(Layout(2, 2)).url)
    assert state["head.weight"].tensors.keys() == {"value", "exp_avg", "exp_avg_sq", "ema"}
    assert state["head.weight"].group == {"lr": 0.01, "weight_decay": 0.1, "lr_scale": 1.0, "step": 3.0}
    assert state["head.bias"].group["weight_decay"] == 0.0
    assert len({tuple(sorted(f.group.items())) for f in state.values() if f.group}) >= 2
    assert state["trunk.patch_embed.proj.weight"].tensors.keys() == {"value"}, "frozen"
    assert state["count"].tensors["value"].tolist() == [12345678901]
    assert state["memory"].tensors["value"].tolist() == [i / 4 for i in range(7)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_144_pairs(trial: Trial) -> None:
    pairs = list(itertools.product(ALL, ALL))
    assert len(pairs) == 144
    for origin, goal in pairs:
        trial.check(origin, goal)
