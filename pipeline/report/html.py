"""The report: one HTML file that holds everything, styles and images too, so that it can be mailed.

No script runs in it, nothing is loaded from anywhere (its own content policy forbids both), and all text is escaped.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from pipeline import storage
from pipeline.report.classes import worst_retrievals
from pipeline.report.curves import confusions, pictures, stage_curves
from pipeline.report.grids import grids
from pipeline.report.markup import Markup, element, join
from pipeline.report.runs import Group, read_data_set, read_groups
from pipeline.report.spec import ReportSpec
from pipeline.report.style import STYLE
from pipeline.report.tables import all_figures, data_sets, facts, headline, overview, retrieval

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(spec: ReportSpec, out: str) -> str:
    """Write the report on some runs.

    Args:
        out: a file ending in .html, or a folder that gets `index.html`; a path or an s3:// URL.

    Returns:
        The file's path or URL.

    Raises:
        DataError: a run directory or data set isn't there.
        StorageError: a place can't be read or written.
    """
    target = out if out.endswith((".html", ".htm")) else storage.join(out, "index.html")
    storage.write(target, render(spec).encode("utf-8"))
    return target


def render(spec: ReportSpec) -> str:
    """The report's text."""
    groups = read_groups(spec)
    sections = [(name, anchor, body) for name, anchor, body in _sections(spec, groups) if body]
    links = [element("a", name, href=f"#{anchor}") for name, anchor, _ in sections]
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("title", spec.title),
            element("style", Markup(STYLE)),
        ),
        element(
            "body",
            element(
                "header",
                element("h1", spec.title),
                element("p", _with_code(spec.about), class_="lead") if spec.about else None,
                element("p", _summary(groups), class_="soft"),
                element("nav", links, aria_label="Sections"),
            ),
            element(
                "main",
                [element("section", element("h2", name, id=anchor), body) for name, anchor, body in sections],
            ),
            element("footer", "Written by vitrail from the run directories named above."),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _with_code(text: str) -> list[Markup | str]:
    """Text in which what stands between backticks is code."""
    return [element("code", part) if place % 2 else part for place, part in enumerate(text.split("`"))]


def _sections(spec: ReportSpec, groups: tuple[Group, ...]) -> Iterator[tuple[str, str, Markup]]:
    """Title, anchor and content of each section; those without content aren't shown."""
    yield "Results", "results", join([*headline(spec, groups), *grids(spec, groups), *all_figures(groups)])
    yield "Pictures", "pictures", join(pictures(groups))
    yield "Confusion", "confusion", join(confusions(groups))
    yield "Retrieval", "retrieval", join([*retrieval(groups), *worst_retrievals(groups)])
    yield "Training", "training", join([overview(groups), *stage_curves(groups)])
    sets = {label: read_data_set(url) for label, url in spec.datasets.items()}
    yield "Data", "data", join(data_sets(sets)) if sets else Markup("")
    yield "How each run was made", "runs", join(facts(groups))


def _summary(groups: tuple[Group, ...]) -> str:
    runs = [run for group in groups for run in group.runs]
    states: dict[str, int] = {}
    for run in runs:
        state = str(run.status.get("state", "unknown"))
        states[state] = states.get(state, 0) + 1
    told = ", ".join(f"{num} {state}" for state, num in states.items())
    date = datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    return f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} ({told}) · {date}"
