"""What a stage needs to know about the classes that labels stand for."""

from __future__ import annotations

from typing import NamedTuple


class LabelUse(NamedTuple):
    """A use of labels as indices of the training data's classes, which requires all sets to have the same classes."""

    why: str  # what the stage does with them, for messages: "learns classes"
    instead: str = ""  # for messages: what to do other than prepare all sets with one list of classes


LEARNT = LabelUse("learns classes")
NEIGHBOURS = LabelUse(
    "compares labels with those of the training data (options.evaluate)",
    ", or leave it out of options.evaluate and measure such sets afterwards, by neighbours in a training set",
)
