"""Which settings may differ when a run is resumed."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import ChangesOnResume, Config, keys_that_change, validate
from pipeline.errors import ConfigError
from pipeline.run_dir import RunDir
from pipeline.stages.mae import MaeOptions
from pipeline.train.changes import check_unchanged
from pipeline.train.config import TrainConfig

MODEL = {"width": 16, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 4}
CONFIG: dict[str, Any] = {"name": "a", "optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "data": {"loader_workers": 1}}


@pytest.fixture
def run(tmp_path: Any) -> RunDir:
    return RunDir(str(tmp_path / "runs" / "a"))


def prepare(run: RunDir, document: dict[str, Any]) -> None:
    check_unchanged(run, document, MaeOptions)
    run.prepare(document)


def whole(**changes: Any) -> dict[str, Any]:
    """A valid configuration, as a run directory holds it."""
    document = {
        "name": "a",
        "stage": "mae",
        "options": {"model": MODEL, "mask_ratio": 0.5},
        "data": {"train": "folder", "global_batch": 16},
        "length_samples": 64,
        "optim": {"lr": 0.1},
        **changes,
    }
    return validate(TrainConfig, document, where="test").model_dump(mode="json")


def test_a_run_that_never_began_may_be_corrected(run: RunDir) -> None:
    prepare(run, CONFIG)
    run.write_status(state="failed")
    prepare(run, {**CONFIG, "seed": 1})
    assert run.config() == {**CONFIG, "seed": 1}


def test_changed_keys_are_named_and_free_ones_are_not(run: RunDir) -> None:
    prepare(run, CONFIG)
    run.write_status(attempt=1)
    changed = {"name": "a", "optim": {"lr": 0.2, "betas": (0.9, 0.95)}, "data": {"loader_workers": 4}, "seed": 1}
    with pytest.raises(ConfigError) as caught:
        prepare(run, changed)
    message = str(caught.value)
    assert "optim.lr: 0.1 -> 0.2" in message
    assert "seed: unset -> 1" in message
    assert "betas" not in message
    assert "workers" not in message
    assert run.config() == CONFIG, "nothing was written"
    prepare(run, {**CONFIG, "data": {"loader_workers": 4}})


@pytest.mark.parametrize("key", ["block", "lanes", "window", "global_batch", "crops_per_image", "train"])
def test_what_fixes_the_order_of_samples_stays(run: RunDir, key: str) -> None:
    prepare(run, {"name": "a", "data": {key: 1}})
    run.write_status(attempt=1)
    with pytest.raises(ConfigError, match=f"data.{key}: 1 -> 2"):
        prepare(run, {"name": "a", "data": {key: 2}})


def test_a_key_that_came_with_a_newer_version_is_no_change(run: RunDir) -> None:
    earlier = {key: value for key, value in whole().items() if key != "spikes"}
    run.prepare(earlier)
    run.write_status(attempt=1)
    prepare(run, whole())
    with pytest.raises(ConfigError, match=r"spikes: unset -> \{"):
        prepare(run, whole(spikes={}))


def test_former_keys_and_defaults_written_out_are_no_change(run: RunDir) -> None:
    earlier = whole()
    earlier["data"]["workers"] = earlier["data"].pop("loader_workers")
    run.prepare(earlier)
    run.write_status(attempt=1)
    prepare(run, whole())
    options = validate(MaeOptions, earlier["options"], where="test")
    prepare(run, whole(options=options.model_dump(mode="json")))
    with pytest.raises(ConfigError, match=r"options.mask_ratio: 0.5 -> 0.75"):
        prepare(run, whole(options={"model": MODEL, "mask_ratio": 0.75}))


def test_the_settings_of_a_run_that_may_change_are_these() -> None:
    """Add to this list with care: what a run learns must not depend on the setting."""
    assert keys_that_change(TrainConfig) == [
        "data.loader_workers",
        "data.evaluate_batch",
        "data.max_unreadable",
        "data.takedown",
        "data.cache",
        "engine.zero_stage",
        "engine.micro_batch",
        "checkpoint.every_samples",
        "checkpoint.keep_last",
        "checkpoint.keep_every_samples",
        "ema.evaluate",
        "nonfinite.max_consecutive",
        "nonfinite.max_rollbacks",
        "watchdog",
        "max_fruitless_attempts",
        "log_every_samples",
        "evaluate_every_samples",
        "time_limit_s",
        "runs",
    ]


class _Inner(Config):
    free: ChangesOnResume[int | None] = None
    fixed: int = 0


class _Outer(Config):
    inner: _Inner | None = None
    several: tuple[_Inner, ...] = ()


def test_marks_are_found_in_nested_options_and_leave_validation_alone() -> None:
    assert keys_that_change(_Outer, "options.") == ["options.inner.free", "options.several.free"]
    assert validate(_Outer, {"inner": {"free": 3}}, where="test").inner == _Inner(free=3)
    with pytest.raises(ConfigError, match=r"inner\.free"):
        validate(_Outer, {"inner": {"free": "three"}}, where="test")
