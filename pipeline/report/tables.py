"""The report's tables: figures beside their baselines, all figures, retrieval, facts of runs and data sets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.pages.numbers import count, duration, number, size
from pipeline.report.figures import Bar, bar_chart
from pipeline.report.intervals import Measure, is_proportion
from pipeline.report.markup import Markup, Node, element
from pipeline.report.runs import DataSet, Group, Run, measure
from pipeline.report.spec import ReportSpec, Row, Source

_RETRIEVAL = re.compile(r"(?P<set>.*)/retrieval_(?P<direction>i2t|t2i)_r(?P<rank>\d+)")
_DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}


def headline(spec: ReportSpec, groups: Sequence[Group]) -> Iterator[Markup]:
    """The table of every row beside its baselines, and a small chart of each."""
    if not spec.rows:
        return
    labels = list(dict.fromkeys(label for row in spec.rows for label in row.baselines))
    head = [
        element("th", "Figure", scope="col"),
        *(element("th", name, scope="col", class_="num") for name in ("Result", "95% interval", "n", *labels)),
    ]
    body, charts = [], []
    for row in spec.rows:
        result = measure(groups, row, row.num_samples)
        baselines = {label: _baseline(groups, row, result, value) for label, value in row.baselines.items()}
        body.append(element("tr", _headline_cells(row, groups, result, baselines, labels)))
        if result is not None and any(baselines.values()):  # a bar by itself compares nothing
            charts.append(_comparison(row, result, baselines))
    several = any(len(group.runs) > 1 for group in groups)
    yield _table(head, body)
    yield element(
        "p",
        "Intervals are Wilson's for a binomial proportion over n samples. ",
        "With several seeds the figure is mean ± standard deviation over them. " if several else None,
        "A comparison of two figures on the same samples can be surer than their intervals suggest.",
        class_="note",
    )
    yield element("div", charts, class_="pair")


def all_figures(groups: Sequence[Group]) -> Iterator[Markup]:
    """Every figure of every run's last evaluation."""
    head = [
        element("th", "Run", scope="col"),
        element("th", "Figure", scope="col"),
        *(element("th", name, scope="col", class_="num") for name in ("Value", "95% interval", "n")),
    ]
    body = []
    for group in groups:
        for name in sorted({name for run in group.runs for name in run.figures}):
            found = measure(groups, Source(run=group.label, figure=name))
            if found is None:
                continue
            body.append(
                element(
                    "tr",
                    element("td", group.label),
                    element("td", element("code", name)),
                    element("td", found.text(), class_="num"),
                    element("td", found.interval_text() or "", class_="num"),
                    element("td", count(found.num_samples) if found.num_samples else "", class_="num"),
                )
            )
    if body:
        yield element(
            "details", element("summary", f"All {len(body)} figures of the last evaluations"), _table(head, body)
        )


def retrieval(groups: Sequence[Group]) -> Iterator[Markup]:
    """Recall at K of image-text retrieval, a line for each run, evaluation set and direction."""
    found: dict[tuple[str, str, str], dict[int, Measure]] = {}
    for group in groups:
        for name in group.runs[0].figures:
            match = _RETRIEVAL.fullmatch(name)
            value = measure(groups, Source(run=group.label, figure=name)) if match else None
            if match and value is not None:
                key = (group.label, match["set"], match["direction"])
                found.setdefault(key, {})[int(match["rank"])] = value
    if not found:
        return
    ranks = sorted({rank for row in found.values() for rank in row})
    head = [
        *(element("th", name, scope="col") for name in ("Run", "Set", "Direction")),
        *(element("th", f"R@{rank}", scope="col", class_="num") for rank in ranks),
        element("th", "n", scope="col", class_="num"),
    ]
    body = []
    for (label, name, direction), row in found.items():
        num = next(iter(row.values())).num_samples
        cells = [row[rank].text() if rank in row else "" for rank in ranks]
        body.append(
            element(
                "tr",
                *(element("td", text) for text in (label, name, _DIRECTIONS[direction])),
                *(element("td", text, class_="num") for text in cells),
                element("td", count(num) if num else "", class_="num"),
            )
        )
    for name, num in dict.fromkeys((key[1], next(iter(row.values())).num_samples) for key, row in found.items()):
        if num:
            chances = [number(min(1.0, rank / num), proportion=True) for rank in ranks]
            cells = [element("td", text, class_="num") for text in (*chances, count(num))]
            body.append(element("tr", *(element("td", text) for text in ("chance", name, "")), cells))
    yield element(
        "p",
        "Share of queries with a right answer among the first K; equal captions are right for one another. ",
        "Chance is K/n, that of distinct captions.",
        class_="note",
    )
    yield _table(head, body)


def overview(groups: Sequence[Group]) -> Markup:
    """One line a run: what it was, how far it got, on what."""
    names = ("Samples", "Steps", "Processes", "ZeRO", "Precision", "Parameters", "Attempts", "Duration")
    head = [
        *(element("th", name, scope="col") for name in ("Run", "Stage", "State")),
        *(element("th", name, scope="col", class_="num") for name in names),
    ]
    body = []
    for label, run in _labelled(groups):
        status = run.status
        state = str(status.get("state", "unknown"))
        wanted = status.get("length_samples")
        samples = _count(status.get("samples")) + (f" of {count(wanted)}" if wanted and state != "done" else "")
        precision = status.get("precision") or run.resolved.get("precision")
        cells = (
            samples,
            _count(status.get("step")),
            _count(status.get("world_size", run.resolved.get("world_size"))),
            _plain(status.get("zero_stage", run.resolved.get("zero_stage"))),
            _plain(precision),
            size(status["num_parameters"]) if status.get("num_parameters") else "",
            _count(status.get("attempt")),
            duration(_duration_s(run)) if _duration_s(run) else "",
        )
        body.append(
            element(
                "tr",
                element("th", label, scope="row"),
                element("td", run.stage),
                element("td", state, class_=f"state-{state}"),
                *(element("td", text, class_="num") for text in cells),
            )
        )
    return _table(head, body)


def facts(groups: Sequence[Group]) -> Iterator[Markup]:
    """What a reader needs to repeat each run, or to check that two are the same."""
    environments = [run.environment for group in groups for run in group.runs]
    common = environments[0] if all(one == environments[0] for one in environments) else None
    for label, run in _labelled(groups):
        status, config = run.status, run.config
        pairs: list[tuple[str, Node]] = [
            ("Run directory", element("code", run.url)),
            ("Command", element("code", run.command) if run.command else None),
            ("Seed", _plain(config.get("seed"))),
            ("Initial weights", _code(config.get("init_from"))),
            ("Began from", _code(status.get("resumed_from"))),
            ("Weights SHA-256", _code(status.get("weights_sha256"))),
            ("Data", _code(_training_sets(_nested(config, "data", "train")))),
            ("Global batch", _count(_nested(config, "data", "global_batch"))),
            ("Steps skipped", _count(run.train[-1].get("num_skipped") or None) if run.train else ""),
            ("Waited for data, by rank", _waits(run)),
            ("Samples absent", _count(sum(line.get("num_absent", 0) for line in run.train) or None)),
            ("Message", status.get("message")),
            *((_capital(name), value) for name, value in run.details.items() if isinstance(value, str | int | float)),
            *(() if common else _environment(run.environment)),
        ]
        yield element("h3", label)
        yield _definitions(pairs)
    if common:
        yield element("h3", "Environment of every run" if len(environments) > 1 else "Environment")
        yield _definitions(list(_environment(common)))


def _training_sets(train: object) -> object:
    """A run's training data: one folder, or several."""
    if not isinstance(train, Sequence) or isinstance(train, str):
        return train
    return ", ".join(str(source["url"]) if isinstance(source, Mapping) else str(source) for source in train)


def _waits(run: Run) -> str:
    """Each rank's share of the training time that it waited for data, those of one number of ranks together."""
    told = []
    for world in dict.fromkeys(len(line.get("data_wait_s") or ()) for line in run.train):
        waits, spent_s = [0.0] * world, 0.0
        step_before = 0
        for line in run.train:
            num_steps, step_before = line["step"] - step_before, line["step"]
            if world and len(line.get("data_wait_s") or ()) == world and line.get("step_s") and num_steps > 0:
                waits = [sum(pair) for pair in zip(waits, line["data_wait_s"], strict=True)]
                spent_s += line["step_s"] * num_steps
        if spent_s:
            shares = ", ".join(f"{wait / spent_s:.1%}" for wait in waits[:64])
            told.append(shares + (f" and {world - 64} more" if world > 64 else ""))
    return "; ".join(told)


def data_sets(sets: Mapping[str, DataSet]) -> Iterator[Markup]:
    """Samples, shards and bytes of each data set, and what became of the inputs."""
    head = [
        *(element("th", name, scope="col") for name in ("Data set", "Split")),
        *(
            element("th", name, scope="col", class_="num")
            for name in ("Inputs", "Samples", "Shards", "Size", "Classes")
        ),
    ]
    body = []
    for label, data_set in sets.items():
        for split, manifest in data_set.splits.items():
            cells = (
                _count(manifest.info.get("inputs")),
                count(manifest.num_samples),
                count(len(manifest.shards)),
                size(sum(shard.size_bytes for shard in manifest.shards), "B"),
                count(len(manifest.classes)) if manifest.classes else "",
            )
            body.append(
                element(
                    "tr",
                    *(element("td", text) for text in (label, split)),
                    *(element("td", text, class_="num") for text in cells),
                )
            )
    yield _table(head, body)
    for label, data_set in sets.items():
        if data_set.account.get("failed") or data_set.account.get("filtered"):
            yield from _account(label, data_set.account)


def _account(label: str, account: Mapping[str, Any]) -> Iterator[Markup]:
    """Where the inputs of a data set went, and one example of each reason."""
    refused = {**account.get("filtered", {}), **account.get("failed", {})}
    examples = account.get("examples", {})
    inputs = account.get("inputs", 0)
    rows = [("written", account.get("written", 0), ""), *((r, n, examples.get(r, "")) for r, n in refused.items())]
    head = [
        element("th", "Outcome", scope="col"),
        element("th", "Inputs", scope="col", class_="num"),
        element("th", "Share", scope="col", class_="num"),
        element("th", "Example", scope="col"),
    ]
    body = [
        element(
            "tr",
            element("td", str(reason).replace("_", " ")),
            element("td", count(num), class_="num"),
            element("td", number(num / inputs, proportion=True) if inputs else "", class_="num"),
            element("td", example, class_="note"),
        )
        for reason, num, example in rows
    ]
    yield _table(head, body, caption=f"{label}: what became of {count(inputs)} inputs")


def _headline_cells(
    row: Row,
    groups: Sequence[Group],
    result: Measure | None,
    baselines: Mapping[str, Measure | None],
    labels: list[str],
) -> Iterator[Markup]:
    name = [row.title, element("span", row.note, class_="note") if row.note else None]
    yield element("th", name, scope="row")
    if result is None:
        yield element("td", _missing(groups, row.run, row.figure), colspan=3, class_="missing")
    else:
        seeds = len(result.values)
        yield element("td", result.text(), class_="num result")
        yield element("td", result.interval_text() or (f"{seeds} seeds" if seeds > 1 else ""), class_="num")
        yield element("td", count(result.num_samples) if result.num_samples and result.proportion else "", class_="num")
    for label in labels:
        found = baselines.get(label)
        source = row.baselines.get(label)
        if found is not None:
            yield element("td", found.text(), class_="num")
        elif isinstance(source, Source):
            yield element("td", _missing(groups, source.run, source.figure), class_="missing")
        else:
            yield element("td", "", class_="num")


def _missing(groups: Sequence[Group], label: str, figure: str) -> str:
    """Why a figure can't be shown, with the nearest one there is."""
    group = next(group for group in groups if group.label == label)
    lacking = [run for run in group.runs if figure not in run.figures]
    known = list(lacking[0].figures)
    if not known:
        return "not measured yet"
    close = difflib.get_close_matches(figure, known, n=1)
    return f"not measured: {label} has no {figure}" + (f" (nearest: {close[0]})" if close else "")


def _baseline(groups: Sequence[Group], row: Row, result: Measure | None, value: Source | float) -> Measure | None:
    if isinstance(value, Source):
        found = measure(groups, value, row.num_samples)
        return found._replace(proportion=result.proportion) if found and result else found
    proportion = result.proportion if result else is_proportion(row.figure, (value,))
    return Measure((float(value),), None, proportion)


def _comparison(row: Row, result: Measure, baselines: Mapping[str, Measure | None]) -> Markup:
    def bar(label: str, found: Measure, main: bool = False) -> Bar:
        text = found.text()
        return Bar(label, found.mean, text, found.bounds, main)

    bars = [bar(label, found) for label, found in baselines.items() if found is not None]
    drawn = bar_chart(row.title, [bar(row.run, result, main=True), *bars], percent=result.proportion)
    caption = element("figcaption", element("strong", row.title))
    return element("figure", caption, drawn)


def _labelled(groups: Sequence[Group]) -> Iterator[tuple[str, Run]]:
    """Every run with its label; those of several seeds by their seed."""
    for group in groups:
        for place, run in enumerate(group.runs):
            seed = run.config.get("seed", place)
            yield (group.label if len(group.runs) == 1 else f"{group.label}, seed {seed}"), run


def _duration_s(run: Run) -> float:
    """From the first metrics line to the last, minus the gaps between attempts."""
    lines = [*run.train, *run.evaluations]
    attempts: dict[Any, list[float]] = {}
    for line in lines:
        if "time" in line:
            attempts.setdefault(line.get("attempt"), []).append(float(line["time"]))
    return sum(max(times) - min(times) for times in attempts.values())


def _environment(environment: Mapping[str, Any]) -> Iterator[tuple[str, Node]]:
    """Versions on one line, other plain facts on one each."""
    for key, value in environment.items():
        name = _capital(key)
        if isinstance(value, Mapping):
            yield name, ", ".join(f"{item} {held}" for item, held in value.items() if held not in (None, ""))
        elif isinstance(value, list):
            yield name, ", ".join(str(item) for item in value)
        elif value not in (None, ""):
            yield name, str(value)


def _table(head: Sequence[Markup], body: Sequence[Markup], caption: str | None = None) -> Markup:
    told = element("caption", caption) if caption else None
    inner = element("table", told, element("thead", element("tr", head)), element("tbody", body))
    return element("div", inner, class_="scroll")


def _definitions(pairs: Sequence[tuple[str, Node]]) -> Markup:
    return element("dl", [(element("dt", name), element("dd", value)) for name, value in pairs if value])


def _nested(mapping: Mapping[str, Any], *keys: str) -> Any:
    value: Any = mapping
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _code(value: object) -> Node:
    return element("code", str(value)) if value else None


def _count(value: object) -> str:
    return count(value) if isinstance(value, int | float) else ""


def _capital(name: str) -> str:
    """chosen_head as "Chosen head"."""
    return name[:1].upper() + name[1:].replace("_", " ")


def _plain(value: object) -> str:
    return "" if value is None else str(value)
