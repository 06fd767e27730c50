"""Whole small runs: stopping, resuming on another layout, damaged checkpoints, starting weights, changed settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.commits import find_commits
from pipeline.train.checkpoints.restore import read_weights
from tests.support import run_cases, train_cases
from tests.support.process_group import ProcessGroup


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    train_cases.write_data(made)
    return made


@pytest.fixture(scope="module")
def straight(folder: Path, two: ProcessGroup) -> RunDir:
    """A run of 20 steps without interruption, on two ranks."""
    outcome = two.run(run_cases.run, train_cases.document(folder, "straight"))
    assert outcome[0][:3] == ("done", 20, 320)
    assert outcome[0] == outcome[1]
    return RunDir(str(folder / "runs" / "straight"))


def test_a_finished_run_leaves_all_there_is_to_see(straight: RunDir) -> None:
    status = straight.status()
    assert status["state"] == "done"
    assert (status["step"], status["samples"], status["length_samples"]) == (20, 320, 320)
    lines = straight.metrics()
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 21))
    assert len(train[0]["data_wait_s"]) == 2
    assert train[-1]["loss"] < train[0]["loss"]
    assert [line["figures"].keys() for line in lines if line["kind"] == "evaluate"] == [{"heldout/reconstruction_mse"}]
    (table,) = straight.pictures().values()
    assert Path(table[0]["panels"][0]["file"]).read_bytes().startswith(b"\x89PNG")
    assert straight.resolved()["num_steps"] == 20
    assert "torch" in straight.environment()["packages"]
    events = list(Path(straight.at("tensorboard")).iterdir())
    assert len(events) == 1
    assert b"train/loss" in events[0].read_bytes()


def test_running_a_finished_run_again_changes_nothing(folder: Path, straight: RunDir, two: ProcessGroup) -> None:
    before, lines = straight.status(), len(straight.metrics())
    outcome = two.run(run_cases.run, train_cases.document(folder, "straight"))[0]
    assert outcome == ("done", 20, 320, before["weights_sha256"])
    assert len(straight.metrics()) == lines


def test_a_stop_on_one_rank_saves_and_the_rerun_ends_alike(folder: Path, straight: RunDir, two: ProcessGroup) -> None:
    document = train_cases.document(folder, "stopped")
    assert two.run(run_cases.run, document, 6, 0)[1][:3] == ("stopped", 6, 96)
    run = RunDir(str(folder / "runs" / "stopped"))
    assert run.status()["state"] == "stopped"
    assert run_cases.committed_steps(run.checkpoints_url) == [6, 4]
    assert two.run(run_cases.run, document)[0] == ("done", 20, 320, straight.status()["weights_sha256"])


@pytest.mark.parametrize(("zero_stage", "num_ranks"), [(3, 2), (0, 1), (2, 1)])
def test_a_run_goes_on_with_another_layout(
    folder: Path, straight: RunDir, one: ProcessGroup, two: ProcessGroup, zero_stage: int, num_ranks: int
) -> None:
    name = f"moved-{zero_stage}-{num_ranks}"
    assert two.run(run_cases.run, train_cases.document(folder, name), 8)[0][0] == "stopped"
    document = train_cases.document(folder, name, **{"engine.zero_stage": zero_stage, "engine.micro_batch": 4})
    assert {1: one, 2: two}[num_ranks].run(run_cases.run, document)[0][:3] == ("done", 20, 320)
    moved = RunDir(str(folder / "runs" / name))
    for ours, theirs in zip(moved.metrics()[-2:], straight.metrics()[-2:], strict=True):
        assert (ours["kind"], ours["step"]) == (theirs["kind"], theirs["step"])
        for key, value in {**theirs, **theirs.get("figures", {})}.items():
            if key in ("loss", "grad_norm", "heldout/reconstruction_mse"):
                assert {**ours, **ours.get("figures", {})}[key] == pytest.approx(value, rel=1e-3), key


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "file"),
    [
        ("flip", "rank-00001.safetensors"),
        ("truncate", "rank-00000.safetensors"),
        ("delete", "rank-00001.table.json"),
        ("flip", "rank-00000.table.json"),
        ("truncate", "commit.json"),
    ],
)
def test_a_damaged_checkpoint_makes_the_run_fall_back(
    folder: Path, straight: RunDir, two: ProcessGroup, how: str, file: str
) -> None:
    document = train_cases.document(folder, f"damaged-{how}-{file}")
    assert two.run(run_cases.run, document, 6)[0][0] == "stopped"
    run = RunDir(str(folder / "runs" / str(document["name"])))
    newest = find_commits(run.checkpoints_url).commits[0]
    damage(Path(newest.url) / file, how)
    assert two.run(run_cases.run, document)[0] == ("done", 20, 320, straight.status()["weights_sha256"])
    assert run.status()["resumed_from"] == "checkpoint at step 4 of attempt 1"


def test_damage_to_all_checkpoints_stops_instead_of_starting_over(folder: Path, two: ProcessGroup) -> None:
    document = train_cases.document(folder, "ruined")
    assert two.run(run_cases.run, document, 6)[0][0] == "stopped"
    run = RunDir(str(folder / "runs" / "ruined"))
    for commit in find_commits(run.checkpoints_url).commits:
        damage(Path(commit.url) / "rank-00000.safetensors", "flip")
    kind, message, fix = two.run(run_cases.run, document)[1]
    assert kind == "CheckpointError"
    assert "no checkpoint can be used" in message
    assert "step 6" in message
    assert "delete the folder to start over" in fix


def test_weights_that_were_altered_are_not_read(folder: Path, straight: RunDir, two: ProcessGroup) -> None:
    document = train_cases.document(folder, "altered")
    assert two.run(run_cases.run, document, 6)[0][0] == "stopped"
    newest, older = find_commits(str(folder / "runs" / "altered" / "checkpoints")).commits
    names = sorted(read_weights(newest.url))
    damage(Path(newest.url) / "rank-00000.safetensors", "truncate")
    assert sorted(read_weights(str(folder / "runs" / "altered"))) == names, "it falls back to the older one"
    damage(Path(older.url) / "rank-00001.safetensors", "delete")
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is missing"):
        read_weights(str(folder / "runs" / "altered"))


def test_changed_settings_are_refused_by_key_and_nothing_is_written(
    folder: Path, straight: RunDir, two: ProcessGroup
) -> None:
    before = {path: path.read_bytes() for path in Path(straight.url).rglob("*") if path.is_file()}
    changes: dict[str, Any] = {"optim.lr": 2e-3, "options.mask_ratio": 0.75, "data.loader_workers": 1}
    kind, message, fix = two.run(run_cases.run, train_cases.document(folder, "straight", **changes))[0]
    assert kind == "ConfigError"
    assert "optim.lr: 0.001 -> 0.002" in message
    assert "options.mask_ratio: 0.5 -> 0.75" in message
    assert "loader_workers" not in message
    assert "name" in fix
    assert before == {path: path.read_bytes() for path in Path(straight.url).rglob("*") if path.is_file()}


def test_world_sizes_that_do_not_fit_are_refused_with_those_that_do(folder: Path, two: ProcessGroup) -> None:
    document = train_cases.document(folder, "odd", **{"data.global_batch": 15, "data.lanes": 5})
    kind, message, fix = two.run(run_cases.run, document)[0]
    assert (kind, message) == (
        "ConfigError",
        "data.global_batch: a global batch of 15 can't be shared equally by 2 ranks",
    )
    assert "1, 3, 5" in fix
    assert not (folder / "runs" / "odd").exists()


def test_unknown_option_of_the_stage_names_its_key(folder: Path, one: ProcessGroup) -> None:
    kind, message, fix = one.run(run_cases.run, train_cases.document(folder, "typo", **{"options.mask_ration": 0.5}))[0]
    assert (kind, message) == ("ConfigError", "typo: options.mask_ration: unknown key 'mask_ration'")
    assert "mask_ratio" in fix
    assert not (folder / "runs" / "typo").exists()


def test_weights_of_another_run_are_taken_bit_for_bit(folder: Path, straight: RunDir, two: ProcessGroup) -> None:
    document = train_cases.document(
        folder,
        "tuned",
        **{"init_from": straight.url, "engine.precision": "bf16", "optim.lr": 1e-30, "optim.weight_decay": 0.0},
    )
    assert two.run(run_cases.run, document)[0][0] == "done"
    ours, theirs = read_weights(str(folder / "runs" / "tuned")), read_weights(straight.url)
    trunk = [name for name in theirs if name.startswith("trunk.")]
    assert trunk
    for name in trunk:
        assert torch.equal(ours[name], theirs[name]), name
    assert not torch.equal(ours["decoder.decoder_pred.weight"], theirs["decoder.decoder_pred.weight"])
    assert RunDir(str(folder / "runs" / "tuned")).status()["resumed_from"] == f"init_from {straight.url}"


def test_weights_that_do_not_fit_name_the_parameter(folder: Path, straight: RunDir, two: ProcessGroup) -> None:
    document = train_cases.document(folder, "wide", **{"init_from": straight.url, "options.model.width": 32})
    kind, message, _ = two.run(run_cases.run, document)[0]
    assert kind == "CheckpointError"
    assert "trunk.cls_token is 1x1x16 there and 1x1x32 here" in message
    missing = train_cases.document(folder, "none", init_from=str(folder / "train"))
    kind, message, _ = two.run(run_cases.run, missing)[0]
    assert (kind, message) == ("CheckpointError", f"{folder / 'train'}: no checkpoint")


def test_other_data_under_the_same_name_are_refused(folder: Path, two: ProcessGroup) -> None:
    document = train_cases.document(folder, "fed")
    assert two.run(run_cases.run, document, 4)[0][0] == "stopped"
    manifest = folder / "train" / "manifest.json"
    before = manifest.read_text()
    changed = json.loads(before)
    changed["shards"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(changed))
    try:
        kind, message, _ = two.run(run_cases.run, document)[0]
    finally:
        manifest.write_text(before)
    assert kind == "DataError"
    assert "order of samples" in message


def test_retention_keeps_the_newest_and_one_per_interval(folder: Path, one: ProcessGroup) -> None:
    changes = {"checkpoint.every_samples": 32, "checkpoint.keep_last": 2, "checkpoint.keep_every_samples": 96}
    assert one.run(run_cases.run, train_cases.document(folder, "kept", **changes))[0][0] == "done"
    assert run_cases.committed_steps(str(folder / "runs" / "kept" / "checkpoints")) == [20, 18, 12, 6]


def test_a_time_limit_stops_in_time_to_save(folder: Path, one: ProcessGroup) -> None:
    outcome = one.run(run_cases.run, train_cases.document(folder, "limited", time_limit_s=1e-3))[0]
    assert outcome[0] == "stopped"
    assert run_cases.committed_steps(str(folder / "runs" / "limited" / "checkpoints")) == [outcome[1]]


def test_training_that_diverges_ends_with_the_samples_named(folder: Path, two: ProcessGroup) -> None:
    changes = {
        "optim.lr": 1e30,
        "optim.warmup_samples": 0,
        "nonfinite.max_consecutive": 3,
        "checkpoint.every_samples": 16,
    }
    kind, message, fix = two.run(run_cases.run, train_cases.document(folder, "diverged", **changes))[1]
    assert kind == "DataError"
    assert "3 steps in a row" in message
    assert "sample ids" in message
    assert "lower optim.lr" in fix
    run = RunDir(str(folder / "runs" / "diverged"))
    assert run.status()["state"] == "failed"
    assert "after 2 rollback(s)" in message
    assert run.metrics()[-1]["num_skipped"] == 2 * 3 + 2, "the last one ends the run before it is logged"


def test_bad_steps_in_a_row_are_gone_back_from_and_passed_over(
    folder: Path, straight: RunDir, two: ProcessGroup, capfd: pytest.CaptureFixture[str]
) -> None:
    """Steps 11, 12, 13 are NaN on rank 1: the run resumes step 6, the last one before the window of 8 ... 13."""
    changes = {"nonfinite.max_consecutive": 3, "checkpoint.every_samples": 32, "checkpoint.keep_last": 4}
    document = train_cases.document(folder, "rolled", **changes)
    outcome = two.run(run_cases.run_with_bad_samples, document, (160, 208))
    assert outcome[0][:3] == outcome[1][:3] == ("done", 20, 320)
    run = RunDir(str(folder / "runs" / "rolled"))
    status = run.status()
    assert (status["num_skipped"], status["num_rollbacks"], status["attempt"]) == (3, 1, 2)
    logged = [line["step"] for line in run.metrics() if line["kind"] == "train"]
    assert logged == [1, 2, 3, 4, 5, 6, 7, 14, 15, 16, 17, 18, 19, 20], "8 to 13 are skipped, all others logged once"
    again = train_cases.document(folder, "rolled-and-stopped", **changes)
    assert two.run(run_cases.run_with_bad_samples, again, (160, 208), 16)[0][0] == "stopped"
    assert two.run(run_cases.run_with_bad_samples, again, (160, 208))[0] == outcome[0]
    assert outcome[0][3] != straight.status()["weights_sha256"]


def test_a_loss_far_above_the_last_ones_is_left_out(folder: Path, two: ProcessGroup) -> None:
    document = train_cases.document(
        folder, "spiky", spikes={"window": 4, "deviations": 1e-6, "floor": 1e-9}, **{"nonfinite.max_consecutive": 100}
    )
    assert two.run(run_cases.run, document)[0][0] == "done"
    run = RunDir(str(folder / "runs" / "spiky"))
    losses = [line["loss"] for line in run.metrics() if line["kind"] == "train"]
    skipped = [line["num_skipped"] for line in run.metrics() if line["kind"] == "train"]
    assert skipped[3] == 0, "there is no limit before the window is full"
    assert 0 < skipped[-1] < 17, "steps above the median of the last ones, and only these"
    applied = losses[:4]
    for number in range(4, 20):
        is_applied = skipped[number] == skipped[number - 1]
        assert is_applied == (losses[number] <= sorted(applied[-4:])[1] / 2 + sorted(applied[-4:])[2] / 2 + 1e-5), (
            number
        )
        applied += [losses[number]] * is_applied


def test_a_refused_start_may_be_corrected_under_the_same_name(
    folder: Path, straight: RunDir, one: ProcessGroup
) -> None:
    wrong = train_cases.document(folder, "corrected", init_from=str(folder / "nowhere"))
    assert one.run(run_cases.run, wrong)[0][0] == "CheckpointError"
    assert RunDir(str(folder / "runs" / "corrected")).status()["state"] == "failed"
    assert one.run(run_cases.run, train_cases.document(folder, "corrected"))[0][0] == "done"


def test_the_whole_state_of_another_run_is_gone_on_from(folder: Path, straight: RunDir, two: ProcessGroup) -> None:
    """In one way only: own checkpoint, then resume_from, then init_from, then scratch."""
    half = train_cases.document(folder, "half")
    assert two.run(run_cases.run, half, 6)[0][0] == "stopped"
    source = str(folder / "runs" / "half")
    document = train_cases.document(folder, "taken-over", resume_from=source, init_from=straight.url)
    assert two.run(run_cases.run, document, 10)[0][0] == "stopped"
    run = RunDir(str(folder / "runs" / "taken-over"))
    assert run.status()["resumed_from"] == "resume_from: checkpoint at step 6 of attempt 1"
    assert two.run(run_cases.run, document)[0] == ("done", 20, 320, straight.status()["weights_sha256"])
    assert run.status()["resumed_from"] == "checkpoint at step 10 of attempt 1"
    nowhere = train_cases.document(folder, "no-source", resume_from=str(folder / "train"))
    kind, message, _ = two.run(run_cases.run, nowhere)[0]
    assert (kind, message) == ("CheckpointError", f"{folder / 'train'}: no checkpoint to resume from")
