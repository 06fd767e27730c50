"""The report: what it shows, that it holds all it needs, and that nothing foreign in it comes alive."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import validate
from pipeline.data.manifest import Manifest, Shard, manifest_bytes
from pipeline.errors import ConfigError, DataError
from pipeline.pages.render import content_policy
from pipeline.report.html import SCRIPTS, UPLOT, render, write_report
from pipeline.report.spec import ReportSpec

CLASSES = ["red ring", "blue star", "green disc", "grey cross"]


class Page(HTMLParser):
    """The page's elements, text, and table rows as lists of cell texts."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.scripts: list[tuple[str | None, str]] = []  # type and text
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if "script" in self.open:
            self.scripts.append((self.elements[-1][1].get("type"), data))
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def charts(self) -> list[str]:
        """What screen readers get of each chart."""
        return [plot.get("aria-label") or "" for plot in self.all("div") if plot.get("role") == "img"]

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0].startswith(first))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(document: Mapping[str, Any]) -> Page:
    text = render(validate(ReportSpec, document, where="test"))
    parsed = Page(text)
    assert not parsed.open
    return parsed


def test_a_figure_stands_beside_its_baselines(make_run: Any) -> None:
    flip = make_run(
        "flip",
        stage="flip",
        evaluations=[{"heldout/zeroshot_top1": 0.75}],
        details={"heldout/zeroshot_confusion": [[75, 25], [25, 75]], "classes": CLASSES[:2]},
    )
    scratch = make_run("scratch", stage="classify", evaluations=[{"heldout/top1": 0.5}])
    shown = page(
        {
            "runs": {"FLIP": flip, "scratch": scratch},
            "rows": [
                {
                    "title": "Zero-shot",
                    "run": "FLIP",
                    "figure": "heldout/zeroshot_top1",
                    "baselines": {"chance": 0.5, "from scratch": {"run": "scratch", "figure": "heldout/top1"}},
                }
            ],
        }
    )
    assert shown.row("Figure") == ["Figure", "Result", "95% interval", "n", "chance", "from scratch"]
    assert shown.row("Zero-shot") == ["Zero-shot", "75.0%", "68.6 to 80.5%", "200", "50.0%", "50.0%"]


def test_seeds_are_shown_as_mean_and_deviation(make_run: Any) -> None:
    urls = [
        make_run(f"probe-{seed}", stage="probe", seed=seed, evaluations=[{"heldout/top1": value}])
        for seed, value in enumerate((0.5, 0.6, 0.7))
    ]
    shown = page(
        {
            "runs": {"probe": urls},
            "rows": [{"title": "Probe", "run": "probe", "figure": "heldout/top1", "baselines": {"chance": 0.25}}],
        }
    )
    assert shown.row("Probe") == ["Probe", "60.0 ± 10.0%", "3 seeds", "", "25.0%"]
    assert [row[0] for row in shown.rows if row[0].startswith("probe, seed")] == [f"probe, seed {i}" for i in range(3)]


def test_the_sample_count_comes_from_the_data_set(make_run: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path / "heldout", 400)
    run = make_run(
        "probe",
        stage="probe",
        evaluations=[{"heldout/knn_top1": 0.5}],
        config={"data": {"evaluate": {"heldout": str(tmp_path / "heldout")}}},
    )
    rows = [{"title": "kNN", "run": "probe", "figure": "heldout/knn_top1"}]
    assert page({"runs": {"probe": run}, "rows": rows}).row("kNN") == ["kNN", "50.0%", "45.1 to 54.9%", "400"]


def test_a_figure_that_was_not_measured_is_named_with_the_nearest(make_run: Any) -> None:
    run = make_run("flip", evaluations=[{"heldout/zeroshot_top1": 0.75}])
    rows = [
        {
            "title": "Misspelt",
            "run": "flip",
            "figure": "heldout/zeroshot_top_1",
            "baselines": {"other": {"run": "flip", "figure": "heldout/top1"}},
        }
    ]
    row = page({"runs": {"flip": run}, "rows": rows}).row("Misspelt")
    assert "flip has no heldout/zeroshot_top_1 (nearest: heldout/zeroshot_top1)" in row[1]
    assert "flip has no heldout/top1" in row[2]


def test_the_last_evaluation_counts(make_run: Any) -> None:
    run = make_run("mae", evaluations=[{"heldout/reconstruction_mse": 0.9}, {"heldout/reconstruction_mse": 0.4321}])
    rows = [{"title": "Error", "run": "mae", "figure": "heldout/reconstruction_mse", "baselines": {"mean": 1.0}}]
    assert page({"runs": {"mae": run}, "rows": rows}).row("Error") == ["Error", "0.4321", "", "", "1"]


def test_curves_of_one_stage_share_a_chart(make_run: Any) -> None:
    figures = [{"heldout/top1": 0.2}, {"heldout/top1": 0.4}]
    first = make_run("one", stage="classify", evaluations=figures)
    second = make_run("two", stage="classify", evaluations=figures)
    other = make_run("mae", stage="mae")
    charts = page({"runs": {"A": first, "B": second, "C": other}}).charts
    assert "Training loss. A: 4 to 1; B: 4 to 1" in charts
    assert "Training loss. C: 4 to 1" in charts
    assert "heldout/top1. A: 20.0% to 40.0%; B: 20.0% to 40.0%" in charts
    assert "Waiting for data (slowest rank). C: 10.0% to 10.0%" in charts
    assert "Throughput. C: 512 to 512" in charts
    assert "Learning rate. C: 0.001 to 0.001" in charts


def test_waiting_for_data_is_a_share_of_all_steps_since_the_line_before(make_run: Any) -> None:
    run = make_run("mae")
    lines = [
        {"kind": "train", "attempt": 1, "step": step, "samples": step * 256, "loss": 1.0, "data_wait_s": [0.1, 1.0],
         "step_s": 0.5}
        for step in (10, 20)
    ]  # fmt: skip
    (Path(run) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = page({"runs": {"C": run}})
    assert "Waiting for data (slowest rank). C: 20.0% to 20.0%" in shown.charts
    assert "Waited for data, by rank 2.0%, 20.0%" in shown.text


def test_what_was_left_out_of_training_is_told(make_run: Any) -> None:
    run = make_run("mae")
    line = {"kind": "train", "attempt": 1, "step": 9, "samples": 2304, "loss": 1.0, "num_absent": 3, "num_skipped": 2}
    with (Path(run) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    text = page({"runs": {"C": run}}).text
    assert "Steps skipped 2" in text
    assert "Samples absent 3" in text


def test_pictures_are_inside_the_file_with_their_captions(make_run: Any) -> None:
    run = make_run("mae", pictures=["sample 3", "sample 4", "sample 5"])
    shown = page({"runs": {"MAE": run}, "max_pictures": 2})
    images = shown.all("img")
    assert [image["alt"] for image in images[:3]] == [
        "original: sample 3",
        "masked: sample 3",
        "reconstructed: sample 3",
    ]
    assert len(images) == 6
    first = Path(run) / "pictures" / "step-000000004" / "00-picture" / "0-original.png"
    assert images[0]["src"] == f"data:image/png;base64,{base64.b64encode(first.read_bytes()).decode()}"
    assert (images[0]["width"], images[0]["height"]) == ("16", "16")


@pytest.mark.parametrize("key", ["heldout/classes", "classes"])  # of this set; of all sets, as earlier versions wrote
def test_a_zero_shot_confusion_matrix_names_the_classes_it_mixes_up(make_run: Any, key: str) -> None:
    matrix = [[9, 1, 0, 0], [0, 10, 0, 0], [0, 0, 4, 6], [0, 0, 0, 10]]
    run = make_run(
        "flip",
        stage="flip",
        evaluations=[{"heldout/zeroshot_top1": 0.825}],
        details={"heldout/zeroshot_confusion": matrix, "other/classes": ["cat", "dog"], key: CLASSES},
    )
    text = page({"runs": {"FLIP": run}}).text
    assert "FLIP: zero-shot classification, heldout" in text
    assert "33 of 40 right" in text
    assert "green disc taken for grey cross (6 of 10); red ring taken for blue star (1 of 10)" in text


def test_retrieval_is_one_table_with_chance_beside_it(make_run: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path / "heldout", 40)
    figures = {f"heldout/retrieval_{way}_r{k}": k / 20 for way in ("i2t", "t2i") for k in (1, 5, 10)}
    config = {"data": {"evaluate": {"heldout": str(tmp_path / "heldout")}}}
    shown = page({"runs": {"FLIP": make_run("flip", stage="flip", evaluations=[figures], config=config)}})
    assert ["FLIP", "heldout", "image to text", "5.0%", "25.0%", "50.0%", "40"] in shown.rows
    assert ["FLIP", "heldout", "text to image", "5.0%", "25.0%", "50.0%", "40"] in shown.rows
    assert ["chance", "heldout", "", "2.5%", "12.5%", "25.0%", "40"] in shown.rows
    assert ["Run", "Set", "Direction", "R@1", "R@5", "R@10", "n"] in shown.rows


def test_facts_of_each_run_are_shown(make_run: Any) -> None:
    run = make_run(
        "mae",
        status={"state": "stopped", "samples": 512, "step": 2, "attempt": 3, "resumed_from": "step-000000001"},
        config={"init_from": "s3://bucket/other", "seed": 7},
    )
    shown = page({"runs": {"MAE": run}})
    assert shown.row("MAE") == [
        "MAE", "mae", "stopped", "512 of 1,024", "2", "2", "2", "bf16", "5.5M", "3", "3 s",
    ]  # fmt: skip
    for fact in ("step-000000001", "s3://bucket/other", "ab" * 32, "vitrail train mae.yaml", "torch 2.15.0"):
        assert fact in shown.text


def test_a_run_that_has_only_begun_gives_a_report(make_run: Any) -> None:
    run = make_run("mae", losses=(), status={"state": "running"})
    rows = [{"title": "Error", "run": "MAE", "figure": "heldout/reconstruction_mse"}]
    shown = page({"runs": {"MAE": run}, "rows": rows})
    assert shown.row("Error") == ["Error", "not measured yet"]
    assert "1 run (1 running)" in shown.text


def test_a_build_shows_its_splits_and_what_became_of_the_inputs(make_run: Any, tmp_path: Path) -> None:
    for split, num in (("train", 90), ("heldout", 8)):
        write_manifest(tmp_path / "scenes" / split, num)
    account = {
        "inputs": 100, "written": 98, "failed": {"caption_empty": 2}, "examples": {"caption_empty": "row 7"},
        "splits": {"heldout": {}, "train": {}},
    }  # fmt: skip
    (tmp_path / "scenes" / "prep.json").write_text(json.dumps(account))
    shown = page({"runs": {"MAE": make_run("mae")}, "datasets": {"scenes": str(tmp_path / "scenes")}})
    assert ["scenes", "heldout", "", "8", "1", "1 kB", "4"] in shown.rows
    assert ["scenes", "train", "", "90", "1", "1 kB", "4"] in shown.rows
    assert ["written", "98", "98.0%", ""] in shown.rows
    assert ["caption empty", "2", "2.0%", "row 7"] in shown.rows


def test_a_single_split_shows_its_own_account(make_run: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path / "train", 90, {"split": "train", "inputs": 100, "failed": {"caption_empty": 10}})
    shown = page({"runs": {"MAE": make_run("mae")}, "datasets": {"scenes": str(tmp_path / "train")}})
    assert ["scenes", "train", "100", "90", "1", "1 kB", "4"] in shown.rows
    assert ["written", "90", "90.0%", ""] in shown.rows
    assert ["caption empty", "10", "10.0%", ""] in shown.rows


def test_no_data_set_is_one_clear_message(make_run: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a finished data set"):
        page({"runs": {"MAE": make_run("mae")}, "datasets": {"scenes": str(tmp_path / "none")}})


def test_text_from_outside_stays_text(make_run: Any) -> None:
    evil = '<img src=x onerror="alert(1)"></script><!-- &amp; {{ 7 * 7 }} \u2028'
    run = make_run(
        "mae",
        pictures=[evil],
        evaluations=[{f"heldout/{evil}": 1.0}],
        details={
            "heldout/zeroshot_confusion": [[1, 1], [0, 2]],
            "classes": [evil, "</table></script><script>"],
            "heldout/retrieval_worst": [
                {"id": 1, "rank": 2, "found_id": 3, "cosine": 0.1, "found_cosine": 0.2, "caption": evil, "found": evil}
            ],
        },
        status={"message": evil},
    )
    shown = page({"runs": {evil: run}, "title": evil, "about": evil})
    assert not [image for image in shown.all("img") if "onerror" in image]
    assert evil in shown.text
    assert [text for kind, text in shown.scripts if kind is None] == [own_script(path) for path in SCRIPTS]
    drawings = [json.loads(text) for kind, text in shown.scripts if kind == "application/json"]
    assert drawings[0]["series"][0]["label"] == evil


def own_script(path: str) -> str:
    return resources.files("pipeline.report").joinpath(path).read_text(encoding="utf-8")


def test_the_file_needs_nothing_else_and_runs_only_its_own_scripts(make_run: Any, tmp_path: Path) -> None:
    run = make_run("mae", pictures=["sample 1"], evaluations=[{"heldout/top1": 0.5}, {"heldout/top1": 0.6}])
    path = write_report(validate(ReportSpec, {"runs": {"MAE": run}}, where="test"), str(tmp_path / "report"))
    assert path == str(tmp_path / "report" / "index.html")
    assert [file.name for file in (tmp_path / "report").iterdir()] == ["index.html"]
    text = Path(path).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)
    assert "@import" not in text
    assert "url(" not in text
    shown = Page(text)
    policy = content_policy([own_script(path) for path in SCRIPTS])
    assert shown.all("meta")[2] == {"http-equiv": "Content-Security-Policy", "content": policy}
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]
    assert not {"link", "iframe", "object"} & {name for name, _ in shown.elements}
    assert not [name for _, attributes in shown.elements for name in attributes if name.startswith("on")]
    assert len([kind for kind, _ in shown.scripts if kind is None]) == len(SCRIPTS)
    targets = {attributes.get("id") for _, attributes in shown.elements}
    assert {(link["href"] or "").removeprefix("#") for link in shown.all("a")} <= targets


def test_a_file_name_is_kept(make_run: Any, tmp_path: Path) -> None:
    target = str(tmp_path / "mine.html")
    assert write_report(validate(ReportSpec, {"runs": {"MAE": make_run("mae")}}, where="test"), target) == target
    assert Path(target).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_no_run_directory_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no-such.*status\.json.*Fix: give the folder of a run"):
        page({"runs": {"MAE": str(tmp_path / "no-such")}})


def test_a_row_that_names_no_run_is_one_clear_message(make_run: Any) -> None:
    rows = [{"title": "x", "run": "MEA", "figure": "heldout/top1"}]
    with pytest.raises(ConfigError, match=r"rows\.0 names run 'MEA', but `runs` has MAE"):
        page({"runs": {"MAE": make_run("mae")}, "rows": rows})


def test_a_picture_outside_the_run_directory_is_refused(make_run: Any) -> None:
    run = make_run("mae", pictures=["sample 1"])
    (listing,) = Path(run).glob("pictures/*/pictures.json")
    documents = json.loads(listing.read_text())
    documents[0]["panels"][0]["file"] = "../../../secret.png"
    listing.write_text(json.dumps(documents))
    with pytest.raises(DataError, match="leads out of the run"):
        page({"runs": {"MAE": run}})


def write_manifest(folder: Path, num_samples: int, info: dict[str, Any] | None = None) -> None:
    shard = Shard("00000.tar", num_samples, 1000, "0" * 64, "00000.index.npy", "0" * 64)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(
        manifest_bytes(Manifest(str(folder), (shard,), num_samples, "ab", tuple(CLASSES), info or {}))
    )


def test_a_figure_that_is_compared_with_nothing_has_no_bars(make_run: Any) -> None:
    row = {"title": "Error", "run": "mae", "figure": "heldout/reconstruction_mse"}
    mae = make_run("mae", evaluations=[{"heldout/reconstruction_mse": 0.5}])
    for baselines, num_bars in (({}, 0), ({"mean": 1.0}, 2)):
        shown = page({"runs": {"mae": mae}, "rows": [{**row, "baselines": baselines}]})
        assert sum(mark.get("class") == "bar" for mark in shown.all("i")) == num_bars
        assert sum(mark.get("class") == "main" for mark in shown.all("tr")) == min(num_bars, 1)


def test_what_stands_between_backticks_in_the_lead_is_code(make_run: Any) -> None:
    text = render(validate(ReportSpec, {"runs": {"a": make_run("a")}, "about": "run `a <b>` twice"}, where="test"))
    assert '<p class="lead">run <code>a &lt;b&gt;</code> twice</p>' in text


def test_every_chart_has_its_numbers_beneath_it(make_run: Any) -> None:
    urls = [
        make_run(f"probe-{seed}", seed=seed, evaluations=[{"heldout/top1": 0.5}, {"heldout/top1": 0.5 + seed / 10}])
        for seed in (1, 2)
    ]
    shown = page({"runs": {"probe": urls, "MAE": make_run("mae")}})
    assert ["Samples", "probe, seed 1", "probe, seed 2", "MAE"] in shown.rows
    assert ["1,024", "1", "1", "1"] in shown.rows, "the last loss of each"
    assert ["1,024", "60.0%", "70.0%"] in shown.rows, "the last top1 of each"
    assert shown.charts[:2] == [
        "Training loss. probe, seed 1: 4 to 1; probe, seed 2: 4 to 1; MAE: 4 to 1",
        "heldout/top1. probe, seed 1: 50.0% to 60.0%; probe, seed 2: 50.0% to 70.0%",
    ]
    drawings = [json.loads(text) for kind, text in shown.scripts if kind == "application/json"]
    assert len(drawings) == len(shown.charts)
    assert [series["place"] for series in drawings[0]["series"]] == [0, 0, 1], "seeds share their label's colour"


def test_equal_runs_give_equal_reports(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = validate(ReportSpec, {"runs": {"MAE": make_run("mae", pictures=["sample 1"])}}, where="test")
    monkeypatch.setattr("pipeline.report.html._summary", lambda groups: "now")
    assert render(spec) == render(spec)


def test_uplot_comes_with_its_licence_and_says_its_version() -> None:
    assert "The MIT License (MIT)" in own_script(f"{UPLOT}/LICENSE")
    assert f"(v{UPLOT.rpartition('-')[2]})" in own_script(f"{UPLOT}/uPlot.iife.min.js").splitlines()[0]
