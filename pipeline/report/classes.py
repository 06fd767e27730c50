"""Where a model is right and wrong in particular: accuracy class by class, and captions whose image is found late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.pages.numbers import count, number
from pipeline.report.intervals import Measure
from pipeline.report.markup import Markup, element
from pipeline.report.runs import Group


def class_accuracies(matrix: Sequence[Sequence[float]], classes: Sequence[str]) -> Markup:
    """Every class's samples, accuracy and what it is most often taken for, the worst first, behind a line to click."""
    rows = []
    for i, row in enumerate(matrix):
        total = sum(row)
        others = [(num, j) for j, num in enumerate(row) if j != i and num]
        most = max(others, default=None)
        taken = f"{classes[most[1]]} ({number(most[0])})" if most else ""
        rows.append((row[i] / total if total else 2.0, classes[i], total, taken))
    body = []
    for share, label, total, taken in sorted(rows):
        found = Measure((share,), int(total), True) if total else None
        cells = (count(total), found.text() if found else "", (found.interval_text() or "") if found else "")
        body.append(
            element(
                "tr",
                element("th", label, scope="row"),
                *(element("td", text, class_="num") for text in cells),
                element("td", taken),
            )
        )
    heads = ("Class", "Samples", "Accuracy", "95% interval", "Most often taken for")
    head = element("thead", element("tr", *(element("th", text, scope="col") for text in heads)))
    table = element("div", element("table", head, element("tbody", body)), class_="scroll")
    return element("details", element("summary", "Accuracy class by class, the worst first"), table)


def worst_retrievals(groups: Sequence[Group]) -> Iterator[Markup]:
    """The captions whose own image is found last, and whose image is found instead."""
    heads = ("Caption", "Its image is found as number", "Found first instead", "Cosines")
    for group in groups:
        for name, pairs in group.runs[0].details.items():
            if not name.endswith("retrieval_worst") or not isinstance(pairs, list) or not pairs:
                continue
            head = element("thead", element("tr", *(element("th", text, scope="col") for text in heads)))
            body = element("tbody", [_pair(pair) for pair in pairs])
            title = f"{group.label}: the worst pairs of {name.rpartition('/')[0]}"
            table = element("div", element("table", head, body), class_="scroll")
            yield element("details", element("summary", title), table)


def _pair(pair: dict[str, Any]) -> Markup:
    return element(
        "tr",
        element("td", f"{pair['caption']} (sample {pair['id']})"),
        element("td", count(pair["rank"]), class_="num"),
        element("td", f"that of “{pair['found']}” (sample {pair['found_id']})"),
        element("td", f"{pair['cosine']:.3f} against {pair['found_cosine']:.3f}", class_="num"),
    )
