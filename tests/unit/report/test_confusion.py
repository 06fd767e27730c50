"""Confusion matrices: sums, mistakes, and the table whose cells are coloured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.config import validate
from pipeline.report.confusion import Confusion
from pipeline.report.html import render
from pipeline.report.spec import ReportSpec

CLASSES = ("red ring", "blue star")


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str] = CLASSES) -> Confusion:
    return Confusion("zero-shot", True, 1, classes, matrix)


def shown(make_run: Any, matrix: list[list[int]], classes: Sequence[str] = CLASSES) -> str:
    details = {"heldout/zeroshot_confusion": matrix, "heldout/classes": list(classes)}
    run = make_run("run", evaluations=[{"heldout/zeroshot_top1": 0.5}], details=details)
    return render(validate(ReportSpec, {"runs": {"FLIP": run}}, where="test"))


def cells(page: str) -> list[tuple[str, float, str, str]]:
    """Kind, depth, title and text of each cell that isn't empty."""
    pattern = r'<td class="((?:right|wrong)[^"]*)" style="--depth:([\d.]+)" title="([^"]*)">([^<]*)</td>'
    return [(kind, float(depth), title, text) for kind, depth, title, text in re.findall(pattern, page)]


def test_a_confusion_matrix_shows_counts_names_and_shares(make_run: Any) -> None:
    page = shown(make_run, [[3, 1], [0, 4]])
    (right, wrong, full) = cells(page)
    assert [cell[0].split()[0] for cell in (right, wrong, full)] == ["right", "wrong", "right"]
    assert wrong[1] < right[1] < full[1] == 1
    assert wrong[2] == "red ring taken for blue star: 1 of 4"
    assert [cell[3] for cell in (right, wrong, full)] == ["3", "1", "4"]
    assert page.count("<span>red ring</span></th>") == 1
    assert 'title="red ring">red ring</th>' in page
    assert 'aria-label="FLIP: zero-shot classification, heldout: 2 classes, 7 of 8 right"' in page


def test_a_class_without_samples_is_an_empty_row(make_run: Any) -> None:
    page = shown(make_run, [[0, 0], [1, 1]])
    assert len(cells(page)) == 2
    (row, last) = confusion([[0, 0], [1, 1]]).class_accuracies()
    assert row.accuracy is not None
    assert (last.label, last.accuracy, last.mistake) == ("red ring", None, None)


@pytest.mark.parametrize("matrix", [[[1, 2]], [[1], [2]], []])
def test_a_matrix_that_does_not_fit_its_classes_is_left_out(make_run: Any, matrix: list[list[int]]) -> None:
    page = shown(make_run, matrix)
    assert "zero-shot classification" not in page
    assert 'id="confusion"' not in page


def test_mistakes_come_commonest_first_with_the_class_they_are_taken_for() -> None:
    mixed = confusion([[5, 2], [3, 6]])
    assert [(m.num, m.label, m.taken_for, m.total) for m in mixed.mistakes()] == [
        (3, "blue star", "red ring", 9),
        (2, "red ring", "blue star", 7),
    ]
    assert (mixed.right, mixed.total) == (11, 16)


@pytest.mark.parametrize(
    ("num", "density", "drawn"), [(21, "counts", True), (56, "names", True), (80, "", True), (81, "", False)]
)
def test_the_more_classes_the_less_a_cell_has_room_for(make_run: Any, num: int, density: str, drawn: bool) -> None:
    matrix = [[int(i == j) for j in range(num)] for i in range(num)]
    classes = [f"class {i}" for i in range(num)]
    page = shown(make_run, matrix, classes)
    assert confusion(matrix, classes).density == density
    assert (f'<table class="matrix {density}"' in page) == drawn
    assert f"{num} of {num} right" in page
