"""Tables of a figure over two settings, class by class, and of the worst pairs."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.report.estimates import student_95
from pipeline.report.html import render
from pipeline.report.spec import ReportSpec

FIGURE = "heldout/zeroshot_top1"


def spec(runs: dict[str, Any], **facts: Any) -> ReportSpec:
    return validate(ReportSpec, {"runs": runs, **facts}, where="test")


def test_a_grid_shows_means_with_intervals_and_differences_paired_by_seed(make_run: Any) -> None:
    def runs(name: str, values: tuple[float, ...]) -> list[str]:
        return [make_run(f"{name}{i}", seed=i, evaluations=[{FIGURE: value}]) for i, value in enumerate(values)]

    labels = {"plain": runs("a", (0.20, 0.30, 0.40)), "better": runs("b", (0.25, 0.35, 0.45)), "one": runs("c", (0.5,))}
    cells = {"scratch": {"0": "plain", "50": "one"}, "MAE": {"0": "better"}}
    text = render(spec(labels, grids=[{"title": "Zero-shot", "figure": FIGURE, "cells": cells}]))
    half = 100 * 4.302653 * 0.1 / 3**0.5
    assert f'30.0% ± {half:.1f}%<span class="note">20.0, 30.0, 40.0</span>' in text
    assert "+5.0% ± 0.0%" in text, "paired: each seed gained the same"
    assert "not measured" in text, "MAE has no cell in column 50"
    assert student_95(2) == pytest.approx(4.302653, rel=1e-6)


def test_a_grid_that_names_no_run_is_refused(make_run: Any) -> None:
    with pytest.raises(ConfigError, match="names run 'none'"):
        spec({"a": make_run("a")}, grids=[{"title": "t", "figure": FIGURE, "cells": {"r": {"c": "none"}}}])


def test_classes_are_listed_worst_first_and_the_worst_pairs_with_what_was_found(make_run: Any) -> None:
    worst = {"id": 3, "rank": 77, "found_id": 9, "cosine": 0.1, "found_cosine": 0.5, "caption": "a <b>", "found": "x"}
    details = {
        "heldout/zeroshot_confusion": [[9, 1], [4, 6]],
        "classes": ["cat", "dog"],
        "heldout/retrieval_worst": [worst],
    }
    text = render(spec({"a": make_run("a", stage="flip", evaluations=[{FIGURE: 0.75}], details=details)}))
    rows = re.sub(r"<[^>]+>", " ", text)
    assert re.search(r"dog\s+10\s+60\.0%.*cat \(4\)\s+cat\s+10\s+90\.0%", rows)
    assert "a &lt;b&gt; (sample 3)" in text
    assert re.search(r"77\s+that of “x” \(sample 9\)\s+0\.100 against 0\.500", rows)
