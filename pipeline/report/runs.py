"""Run directories as the report needs them: settings, curves, last figures, pictures."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.errors import DataError, StorageError
from pipeline.report.estimates import Estimate, is_proportion
from pipeline.report.spec import ComparedFigure, ReportSpec, RunFigure
from pipeline.run_dir import RunDir

_TOP_K = re.compile(r"top\d+(_.*)?$")
ACCOUNT_NAME = "prep.json"  # in the folder of a build, beside its splits


class Panel(NamedTuple):
    """One image of a picture: its caption and PNG bytes."""

    caption: str
    png: bytes

    @property
    def width(self) -> int:
        return png_size(self.png)[0]

    @property
    def height(self) -> int:
        return png_size(self.png)[1]

    @property
    def encoded(self) -> str:
        return base64.b64encode(self.png).decode()


class RunPicture(NamedTuple):
    """Panels shown side by side."""

    title: str
    panels: tuple[Panel, ...]


class Run(NamedTuple):
    """One run directory, read."""

    url: str
    status: Mapping[str, Any]
    config: Mapping[str, Any]  # config.yaml
    resolved: Mapping[str, Any]  # resolved.yaml: what the configuration came to on the machine
    command: str
    environment: Mapping[str, Any]
    train: tuple[Mapping[str, Any], ...]  # metrics lines of kind "train"
    evaluations: tuple[Mapping[str, Any], ...]  # metrics lines of kind "evaluate", oldest first
    details: Mapping[str, Any]  # of the last evaluation
    set_sizes: Mapping[str, int]  # samples of the evaluation sets that can still be read, by name
    pictures_step: int | None
    pictures: tuple[RunPicture, ...]  # of the last step that has any

    @property
    def stage(self) -> str:
        return str(self.status.get("stage") or self.config.get("stage") or "unknown")

    @property
    def figures(self) -> Mapping[str, float]:
        """Figures of the last evaluation."""
        return self.evaluations[-1]["figures"] if self.evaluations else {}


class DataSet(NamedTuple):
    """A data set's splits, and the account of its inputs where the build left one."""

    splits: Mapping[str, Manifest]
    account: Mapping[str, Any]


class RunGroup(NamedTuple):
    """The runs under one label: one, or several seeds."""

    label: str
    runs: tuple[Run, ...]

    @property
    def stage(self) -> str:
        return self.runs[0].stage

    def labelled(self) -> Iterator[tuple[str, Run]]:
        """Every run with its label, which names the seed where there are several."""
        for number, run in enumerate(self.runs):
            seed = run.config.get("seed", number)
            yield (self.label if len(self.runs) == 1 else f"{self.label}, seed {seed}"), run


def read_groups(spec: ReportSpec) -> tuple[RunGroup, ...]:
    """All runs a report names.

    Raises:
        DataError: a run directory doesn't exist, or holds no status.
        StorageError: the place can't be read.
    """
    sizes: dict[str, int | None] = {}
    return tuple(
        RunGroup(label, tuple(read_run(url, sizes, max_pictures=spec.max_pictures) for url in spec.urls(label)))
        for label in spec.runs
    )


def read_run(url: str, sizes: dict[str, int | None], *, max_pictures: int = 6) -> Run:
    """One run directory, as far as the run has got.

    Args:
        sizes: samples of the evaluation sets read so far, by folder; new ones are added.
    """
    directory = RunDir(url)
    status = directory.status()
    if not status:
        raise DataError("no run directory: there is no status.json", where=url, fix="give the folder of a run")
    metrics = directory.metrics()
    evaluations = tuple(line for line in metrics if line.get("kind") == "evaluate")
    step, pictures = _read_pictures(directory, max_pictures)
    config = directory.config() or {}
    return Run(
        url=url,
        status=status,
        config=config,
        resolved=directory.resolved(),
        command=_text(url, "command.txt").strip(),
        environment=directory.environment(),
        train=tuple(line for line in metrics if line.get("kind") == "train"),
        evaluations=evaluations,
        details=_read_details(url, evaluations),
        set_sizes=_set_sizes(config, sizes) if evaluations else {},
        pictures_step=step,
        pictures=pictures,
    )


def estimate(
    groups: Sequence[RunGroup], figure: ComparedFigure | RunFigure, num_samples: int | None = None
) -> Estimate | None:
    """A figure over a label's runs; None if one of them doesn't have it."""
    group = next(group for group in groups if group.label == figure.run)
    values = tuple(float(run.figures[figure.figure]) for run in group.runs if figure.figure in run.figures)
    if len(values) < len(group.runs):
        return None
    kind = figure.kind if isinstance(figure, ComparedFigure) else "auto"
    proportion = is_proportion(figure.figure, values) if kind == "auto" else kind == "proportion"
    return Estimate(values, num_samples or measured_on(group.runs[0], figure.figure), proportion)


def measured_on(run: Run, figure: str) -> int | None:
    """How many samples a figure was measured on: those its confusion matrix counts, else those of its data set."""
    counted = run.details.get(_TOP_K.sub("confusion", figure))
    if counted and _TOP_K.search(figure):
        return sum(map(sum, counted))
    return run.set_sizes.get(figure.rpartition("/")[0])


def read_data_set(url: str) -> DataSet:
    """A split's folder, or the folder of a build with all its splits.

    Raises:
        DataError: neither is there.
    """
    account = json.loads(_text(url, ACCOUNT_NAME) or "{}")
    if account:
        return DataSet({split: read_manifest(storage.join(url, split)) for split in account["splits"]}, account)
    manifest = read_manifest(url)
    written = {"written": manifest.num_samples} if "inputs" in manifest.info else {}
    return DataSet(
        {str(manifest.info.get("split", url.rstrip("/").rpartition("/")[2])): manifest}, {**manifest.info, **written}
    )


def _set_sizes(config: Mapping[str, Any], known: dict[str, int | None]) -> Mapping[str, int]:
    """Samples of a run's evaluation sets, by name, without the sets whose data are gone: their figures have no n."""
    folders = _mapping(_mapping(config.get("data")).get("evaluate"))
    sizes = {}
    for name, folder in folders.items():
        if folder not in known:
            try:
                known[folder] = read_manifest(folder).num_samples
            except (DataError, StorageError):
                known[folder] = None
        size = known[folder]
        if size is not None:
            sizes[name] = size
    return sizes


def _read_details(url: str, evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if not evaluations:
        return {}
    text = _text(url, f"evaluations/step-{evaluations[-1]['step']:09d}.json")
    return _mapping(_mapping(json.loads(text or "{}")).get("details"))


def _read_pictures(directory: RunDir, wanted: int) -> tuple[int | None, tuple[RunPicture, ...]]:
    """The pictures of the last step that has any."""
    by_step = directory.pictures() if wanted else {}
    if not by_step:
        return None, ()
    step = max(by_step)
    pictures = tuple(
        RunPicture(
            str(picture["title"]),
            tuple(
                Panel(str(panel["caption"]), storage.read(_inside(directory, str(panel["file"]))))
                for panel in picture["panels"]
            ),
        )
        for picture in by_step[step][:wanted]
    )
    return step, pictures


def _inside(directory: RunDir, file: str) -> str:
    """`file`, if it lies in the run directory: one from elsewhere mustn't make a report read other files."""
    if ".." in file.split("/"):
        raise DataError(f"picture file {file!r} leads out of the run", where=directory.url, fix="mend pictures.json")
    return file


def _text(url: str, name: str) -> str:
    """A file of the run directory; empty where the run hasn't written it."""
    try:
        return storage.read(storage.join(url, name)).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height from a PNG's header.

    Raises:
        ValueError: these bytes are no PNG.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise ValueError("a picture of a run isn't a PNG file")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
