"""What runs look like: curves over samples, the pictures they drew, their confusion matrices."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence

from pipeline.pages.numbers import count, number
from pipeline.report.classes import class_accuracies
from pipeline.report.figures import NUM_COLOURS, Line, confusion_matrix, line_chart, shorten, smooth
from pipeline.report.intervals import is_proportion
from pipeline.report.markup import Markup, element, join
from pipeline.report.runs import Group, Run, RunPicture

SMOOTH_FROM = 80  # points; shorter curves are shown as they are
SMALL_PIXELS = 200  # images up to this width are enlarged without blurring
OPEN_CHARTS = 3  # of evaluation figures; the others stand behind a line to click
MAX_PAIRS = 8
MAX_MATRIX_CLASSES = 80

Points = list[tuple[float, float]]


def stage_curves(groups: Sequence[Group]) -> Iterator[Markup]:
    """One block a stage: runs of the same stage share a loss, so their curves share a chart."""
    stages = dict.fromkeys(group.stage for group in groups)
    for stage in stages:
        members = [group for group in groups if group.stage == stage]
        if not any(run.train for group in members for run in group.runs):
            continue
        yield element("h3", f"Stage {stage}")
        yield _legend(members)
        evaluations = list(_evaluations(members))
        first, more = evaluations[:OPEN_CHARTS], evaluations[OPEN_CHARTS:]
        yield element("div", [_loss(members), first], class_="pair")
        if more:
            summary = element("summary", f"{len(more)} more figures over training")
            yield element("details", summary, element("div", more, class_="pair"))
        yield element("div", [_rate(members), _throughput(members), _data_wait(members)], class_="triple")


def pictures(groups: Sequence[Group]) -> Iterator[Markup]:
    """What the last evaluation drew, run by run."""
    for group in groups:
        run = group.runs[0]
        if not run.pictures:
            continue
        step = f"step {count(run.pictures_step)}" if run.pictures_step is not None else "last step"
        seed = f", seed {run.config.get('seed')}" if len(group.runs) > 1 else ""
        yield element("h3", f"{group.label}{seed}, {step}")
        most = max(len(picture.panels) for picture in run.pictures)
        yield element(
            "div", [_picture(picture) for picture in run.pictures], class_="pictures" if most > 1 else "thumbs"
        )


def confusions(groups: Sequence[Group]) -> Iterator[Markup]:
    """Confusion matrices: the zero-shot ones open, the others behind a line to click."""
    for group in groups:
        for name in group.runs[0].details:
            if not name.endswith("confusion"):
                continue
            classes = _classes(group.runs[0], name)
            matrices = [run.details[name] for run in group.runs if name in run.details]
            total = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
            if not total or len(total) != len(classes):
                continue
            block = join([_confusion(group, name, total, classes), class_accuracies(total, classes)])
            title = f"{group.label}: {_confusion_title(name)}"
            if "zeroshot" in name:
                yield element("h3", title)
                yield block
            else:
                yield element("details", element("summary", title), block)


def _loss(groups: Sequence[Group]) -> Markup:
    return _chart(groups, "Training loss", "loss", _logged("loss"), smoothed=True)


def _rate(groups: Sequence[Group]) -> Markup:
    return _chart(groups, "Learning rate", "learning rate", _logged("lr"), small=True, from_zero=True)


def _throughput(groups: Sequence[Group]) -> Markup:
    rate = _logged("samples_per_s")
    return _chart(groups, "Throughput", "samples per second", rate, small=True, from_zero=True, smoothed=True)


def _data_wait(groups: Sequence[Group]) -> Markup:
    title, y_label = "Waiting for data (slowest rank)", "share of step time"
    return _chart(groups, title, y_label, data_wait, small=True, smoothed=True, from_zero=True, percent=True)


def _logged(key: str) -> Callable[[Run], Points]:
    """What training lines hold under `key`, over samples."""

    def points(run: Run) -> Points:
        return [(float(line["samples"]), float(line[key])) for line in run.train if line.get(key) is not None]

    return points


def data_wait(run: Run) -> Points:
    """Share of the step time that the rank which waited longest waited for data, over samples.

    `data_wait_s` sums over the steps since the line before, `step_s` is their mean.
    """
    points: Points = []
    step_before = 0
    for line in run.train:
        waits, num_steps = line.get("data_wait_s"), line["step"] - step_before
        step_before = line["step"]
        if waits and line.get("step_s") and num_steps > 0:
            points.append((float(line["samples"]), max(waits) / (line["step_s"] * num_steps)))
    return points


def _chart(
    groups: Sequence[Group],
    title: str,
    y_label: str,
    points_of: Callable[[Run], Points],
    *,
    small: bool = False,
    smoothed: bool = False,
    from_zero: bool = False,
    percent: bool = False,
) -> Markup:
    """Something each run logged while training; nothing where no run has it."""
    lines = []
    for colour, group in enumerate(groups):
        for run in group.runs:
            points = points_of(run)
            many = smoothed and len(points) >= SMOOTH_FROM
            lines.append(Line(group.label, smooth(points) if many else points, colour % NUM_COLOURS))
    drawn = line_chart(
        title,
        lines,
        x_label="samples",
        y_label=y_label,
        width=340 if small else 500,
        height=215 if small else 260,
        from_zero=from_zero,
        percent=percent,
    )
    return element("figure", element("figcaption", element("strong", title)), drawn) if drawn else drawn


def _evaluations(groups: Sequence[Group]) -> Iterator[Markup]:
    """Figures measured more than once, each in a chart of its own."""
    names = dict.fromkeys(
        name for group in groups for run in group.runs if len(run.evaluations) > 1 for name in run.figures
    )
    for name in names:
        lines = []
        for colour, group in enumerate(groups):
            for run in group.runs:
                measured = [line for line in run.evaluations if name in line["figures"]]
                points = [(float(line["samples"]), float(line["figures"][name])) for line in measured]
                lines.append(Line(group.label, points, colour % NUM_COLOURS, dots=True))
        values = [y for line in lines for _, y in line.points]
        percent = is_proportion(name, values)
        drawn = line_chart(name, lines, x_label="samples", y_label=_words(name.rpartition("/")[2]), percent=percent)
        if drawn and len(values) > len(lines):
            yield element("figure", element("figcaption", element("strong", name)), drawn)


def _legend(groups: Sequence[Group]) -> Markup:
    items = [
        element("li", element("i", class_=f"s{place % NUM_COLOURS}"), group.label,
                f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else None)
        for place, group in enumerate(groups)
    ]  # fmt: skip
    return element("ul", items, class_="legend")


def _picture(picture: RunPicture) -> Markup:
    panels = []
    for panel in picture.panels:
        width, height = png_size(panel.png)
        source = f"data:image/png;base64,{base64.b64encode(panel.png).decode()}"
        kind = "small" if width <= SMALL_PIXELS else None
        told = f"{panel.caption}: {picture.title}"
        image = element("img", src=source, alt=told, width=width, height=height, class_=kind)
        panels.append(element("div", image, panel.caption))
    return element("figure", element("figcaption", picture.title), element("div", panels, class_="panels"))


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height from a PNG's header.

    Raises:
        ValueError: these bytes are no PNG.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise ValueError("a picture of a run isn't a PNG file")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _confusion(group: Group, name: str, matrix: list[list[float]], classes: Sequence[str]) -> Markup:
    right = sum(matrix[i][i] for i in range(len(classes)))
    total = sum(map(sum, matrix))
    seeds = f", summed over {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    caption = element(
        "figcaption",
        f"Rows: true class. Columns: predicted class. {number(right)} of {number(total)} right{seeds}. ",
        "The deeper a cell, the larger its share of the row.",
    )
    pairs = sorted(
        ((matrix[i][j], i, j) for i in range(len(classes)) for j in range(len(classes)) if i != j and matrix[i][j]),
        reverse=True,
    )[:MAX_PAIRS]
    worst = element("p", "Most often confused: ", "; ".join(
        f"{classes[i]} taken for {classes[j]} ({number(num)} of {number(sum(matrix[i]))})" for num, i, j in pairs
    ), ".", class_="note") if pairs else None  # fmt: skip
    small = len(classes) <= MAX_MATRIX_CLASSES
    drawn = confusion_matrix(f"{group.label}: {_confusion_title(name)}", matrix, classes) if small else None
    return element("figure", caption, drawn, worst)


def _classes(run: Run, name: str) -> list[str]:
    prefix = name.rpartition("/")[0]
    names = run.details.get(f"{prefix}/classes") or run.details.get("classes") or []
    return [shorten(str(one), 60) for one in names]


def _confusion_title(name: str) -> str:
    """heldout/zeroshot_confusion as "zero-shot classification, heldout"."""
    data_set, _, kind = name.rpartition("/")
    kind = kind.removesuffix("confusion").rstrip("_").replace("zeroshot", "zero-shot").replace("_", " ")
    return f"{kind} classification, {data_set}".strip()


def _words(name: str) -> str:
    """A figure's name for people: heldout/zeroshot_confusion as "heldout, zeroshot confusion"."""
    return name.replace("/", ", ").replace("_", " ")
