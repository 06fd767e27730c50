"""The command line itself: what it imports, prints and returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import train_cases
from tests.unit.data.conftest import numbered, write_data_set

VERBS = ("demo", "prep", "index", "verify", "train", "run", "plan", "doctor", "show", "runs", "report", "convert")
HEAVY = ("torch", "numpy", "ray", "pydantic", "fsspec", "s3fs", "deepspeed", "rich", "pyarrow", "matplotlib", "yaml")


def vitrail(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).resolve().parents[3]
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, launch.cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_verb(tmp_path: Path) -> None:
    done = vitrail("--help", cwd=tmp_path)
    assert done.returncode == 0
    for verb in (
        "demo",
        "prep",
        "index",
        "verify",
        "train",
        "run",
        "plan",
        "doctor",
        "show",
        "runs",
        "report",
        "convert",
    ):
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str, tmp_path: Path) -> None:
    done = vitrail(verb, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--json" in done.stdout


def test_a_wrong_option_is_the_users_error(tmp_path: Path) -> None:
    done = vitrail("train", "--wrkers", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "--wrkers" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_is_one_message_and_with_json_an_object_last_on_stdout(tmp_path: Path) -> None:
    done = vitrail("run", "no-such-chain.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["config error at no-such-chain.yaml: no such file. Fix: check the path"]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["exit_code"] == 2
    assert last["error"] == {
        "type": "ConfigError",
        "what": "no such file",
        "where": "no-such-chain.yaml",
        "fix": "check the path",
    }


def test_nothing_is_left_behind_by_a_command_that_was_refused(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("steps: {a: {kind: prepp}}\n")
    assert vitrail("run", "chain.yaml", cwd=tmp_path).returncode == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chain.yaml"]


def test_runs_in_an_empty_folder_are_none(tmp_path: Path) -> None:
    done = vitrail("runs", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["runs"] == []


def test_a_chain_can_be_planned_without_running_anything(tmp_path: Path) -> None:
    done = vitrail("plan", "configs/demo/demo.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert steps["mae"]["stage"] == "mae"
    assert steps["mae"]["after"] == ["pairs"]
    assert {step["state"] for step in steps.values()} == {"new"}
    assert list(tmp_path.iterdir()) == []


def test_planning_finds_sets_whose_labels_would_be_mixed_up(tmp_path: Path) -> None:
    write_data_set(str(tmp_path / "train"), numbered([40, 24]))
    write_data_set(str(tmp_path / "heldout"), numbered([10]), classes=("cat", "dog"))
    document = train_cases.document(tmp_path, "planned")
    (tmp_path / "mae.yaml").write_text(yaml.safe_dump(document))
    assert vitrail("plan", "mae.yaml", cwd=tmp_path).returncode == 0
    done = vitrail("plan", "mae.yaml", "options.evaluate=[knn]", cwd=tmp_path)
    assert done.returncode == 2
    assert "2 classes, not 7 classes; and stage 'mae' compares labels" in done.stderr


def test_a_folder_that_is_neither_run_nor_data_set_is_said_to_be_so(tmp_path: Path) -> None:
    done = vitrail("show", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "neither a run directory" in done.stderr


def test_doctor_names_a_place_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-someone")
    (tmp_path / "file").write_text("x")
    done = vitrail("doctor", str(tmp_path), "s3://some-bucket", "--json", cwd=tmp_path)
    findings = {(f["name"], f["good"]): f["finding"] for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert f"{tmp_path}: can be listed" in findings["storage", True]
    assert "s3://some-bucket" in findings["storage", False]
    assert "secret-of-someone" not in done.stdout + done.stderr
    assert ("cores", True) in findings
