"""The report: one HTML file that holds everything, styles, images and scripts too, so that it can be mailed.

Templates say how it looks (`templates/report.html.jinja` first); the modules beside this one say what is in it.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence

from pipeline import storage
from pipeline.pages.render import render_page
from pipeline.report import facts
from pipeline.report.confusion import MAX_MISTAKES, confusions
from pipeline.report.curves import stage_curves
from pipeline.report.results import all_figures, grid_tables, headline, retrieval, worst_retrievals
from pipeline.report.runs import RunGroup, read_data_set, read_groups
from pipeline.report.spec import ReportSpec

UPLOT = "assets/uplot-1.6.32"
STYLES = (f"{UPLOT}/uPlot.min.css", "assets/report.css")
SCRIPTS = ("assets/sharpness.js", f"{UPLOT}/uPlot.iife.min.js", "assets/charts.js")


def write_report(spec: ReportSpec, out: str) -> str:
    """Write the report on some runs.

    Args:
        out: a file ending in .html, or a folder that gets `index.html`; a path or an s3:// URL.

    Returns:
        The file's path or URL.

    Raises:
        DataError: a run directory or data set doesn't exist.
        StorageError: a place can't be read or written.
    """
    target = out if out.endswith((".html", ".htm")) else storage.join(out, "index.html")
    storage.write(target, render(spec).encode("utf-8", "replace"))
    return target


def render(spec: ReportSpec) -> str:
    """The report's text."""
    groups = read_groups(spec)
    data_sets = {label: read_data_set(url) for label, url in spec.datasets.items()}
    stages = list(stage_curves(groups))
    recall_ranks, recalls = retrieval(groups)
    return render_page(
        "pipeline.report",
        "report.html.jinja",
        styles=STYLES,
        scripts=SCRIPTS if stages else (),
        title=spec.title,
        about=spec.about,
        summary=_summary(groups),
        groups=groups,
        several_seeds=any(len(group.runs) > 1 for group in groups),
        headline=headline(spec, groups),
        grids=grid_tables(spec, groups),
        all_figures=all_figures(groups),
        confusions=list(confusions(groups)),
        max_mistakes=MAX_MISTAKES,
        recall_ranks=recall_ranks,
        recalls=recalls,
        worst_retrievals=list(worst_retrievals(groups)),
        stages=stages,
        data_sets=data_sets,
        facts=facts,
    )


def _summary(groups: Sequence[RunGroup]) -> str:
    states = Counter(str(run.status.get("state", "unknown")) for group in groups for run in group.runs)
    num_runs = states.total()
    listed = ", ".join(f"{num} {state}" for state, num in states.items())
    date = datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    return f"{num_runs} {'run' if num_runs == 1 else 'runs'} ({listed}) · {date}"
