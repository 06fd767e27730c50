"""detectron2's ViTDet files, both ways; and what a pickle may not do. Outputs are compared in stages/test_vitdet.py."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import convert
from pipeline.convert.arrays import ForbiddenObject, as_tensors, load_arrays
from pipeline.errors import CheckpointError, ConfigError
from pipeline.stages.vitdet import VitDetStage
from tests.support.vitdet_case import weights_of

RECORD = json.loads((Path(__file__).parents[1] / "stages" / "detectron2_vitdet.json").read_text())


def arrays(case: str, *, legacy: bool = False) -> dict[str, np.ndarray]:
    """What detectron2's model holds: parameters, and constants that are no weights."""
    state = {name: weights_of(name, tuple(shape)).numpy() for name, shape in RECORD[case]["shapes"].items()}
    return state | {"pixel_mean": np.zeros((3, 1, 1), np.float32), "pixel_std": np.ones((3, 1, 1), np.float32)}


def write(path: Path, document: Any, protocol: int = 4) -> str:
    path.write_bytes(pickle.dumps(document, protocol=protocol))
    return str(path)


@pytest.mark.parametrize("case", ["mask", "cascade"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_is_read_whole_and_written_as_it_was(case: str, protocol: int, tmp_path: Path) -> None:
    source = write(tmp_path / "model.pkl", {"model": arrays(case), "__author__": "someone"}, protocol)
    weights = convert.read(source, "detectron2")
    stage = convert.load(source, "detectron2")
    assert isinstance(stage, VitDetStage)
    model = stage.options.model
    assert (model.window, model.global_blocks, model.conv_blocks, model.shape.heads) == (3, (1,), (0,), 2)
    assert (model.image_hw, model.position_hw, model.grid) == ((128, 128), (64, 64), (8, 8))
    assert stage.options.detector.cascade == (case == "cascade")
    assert len(stage.data.classes) == 3
    assert set(weights.ignored) == {"pixel_mean", "pixel_std"}
    convert.save(stage, str(tmp_path / "again.pkl"), "detectron2")
    written = pickle.loads((tmp_path / "again.pkl").read_bytes())["model"]
    expected = {name: value for name, value in arrays(case).items() if not name.startswith("pixel")}
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("pos_embed"):  # the row of the cls token, which takes no part, is left behind
            assert not written[name][:, 0].any()
            assert np.array_equal(written[name][:, 1:], value[:, 1:])
        else:
            assert np.array_equal(written[name], value), name


def test_our_own_file_and_back_keeps_every_bit(tmp_path: Path) -> None:
    stage = convert.load(write(tmp_path / "model.pkl", {"model": arrays("cascade")}), "detectron2")
    convert.save(stage, str(tmp_path / "own.safetensors"), "vitrail")
    again = convert.load(str(tmp_path / "own.safetensors"), "vitrail")
    assert again.state_dict().keys() == stage.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in stage.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "beyond", "shape"])
def test_a_file_that_differs_anywhere_is_refused_with_the_name(change: str, tmp_path: Path) -> None:
    state = arrays("mask")
    name = "roi_heads.mask_head.mask_fcn2.norm.weight"
    if change == "missing":
        del state[name]
    elif change == "beyond":
        state["roi_heads.keypoint_head.weight"] = np.zeros(3, np.float32)
    else:
        state[name] = np.zeros(5, np.float32)
    with pytest.raises(CheckpointError, match=r"masks.head.1.1.weight|keypoint_head"):
        convert.read(write(tmp_path / "model.pkl", {"model": state}), "detectron2")


def test_what_tensors_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    state = {name: value for name, value in arrays("mask").items() if "rel_pos" not in name}
    source = write(tmp_path / "model.pkl", {"model": state})
    with pytest.raises(ConfigError, match="heads"):
        convert.read(source, "detectron2")
    with pytest.raises(ConfigError, match="image_size"):
        convert.read(source, "detectron2", heads=2)
    weights = convert.read(source, "detectron2", heads=2, image_size=128)
    assert weights.options["model"]["relative_positions"] is False


def test_what_the_format_cannot_express_is_refused(tmp_path: Path) -> None:
    weights = convert.read(write(tmp_path / "model.pkl", {"model": arrays("mask")}), "detectron2")
    changed = weights._replace(options={**weights.options, "pyramid": "fpn"})
    with pytest.raises(ConfigError, match="FPN variant"):
        convert.save(changed, str(tmp_path / "other.pkl"), "detectron2")


class Shell:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["beside", "within"])
def test_nothing_in_a_pickle_runs(place: str, tmp_path: Path) -> None:
    hostile = Shell(tmp_path / "ran")
    model: dict[str, Any] = dict(arrays("mask")) | ({"x": hostile} if place == "within" else {})
    source = write(tmp_path / "model.pkl", {"model": model} | ({"x": hostile} if place == "beside" else {}))
    with pytest.raises(CheckpointError, match="could execute code"):
        convert.read(source, "detectron2")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "harmless_looking",
    [np.array([object()], dtype=object), np.float64, [np.array(["text"])], {"a": Path("x")}, print],
)
def test_only_numbers_in_arrays_are_built(harmless_looking: Any) -> None:
    with pytest.raises(ForbiddenObject):
        load_arrays(pickle.dumps(harmless_looking))


def test_arrays_of_every_layout_come_back(tmp_path: Path) -> None:
    stored = {
        "rows": np.arange(6, dtype=">f4").reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        "empty": np.zeros((0, 4), np.int64),
        "one": np.float32(0.5),
    }
    for protocol in (2, 4, 5):
        arrays_read = as_tensors(load_arrays(pickle.dumps(stored, protocol=protocol)))
        assert arrays_read["rows"].tolist() == stored["rows"].tolist()
        assert arrays_read["columns"].dtype == torch.float16
        assert arrays_read["columns"].tolist() == stored["columns"].tolist()
        assert arrays_read["empty"].shape == (0, 4)
        assert arrays_read["one"] == 0.5


def test_a_truncated_pickle_is_damaged(tmp_path: Path) -> None:
    content = pickle.dumps({"model": arrays("mask")})
    (tmp_path / "model.pkl").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        convert.read(str(tmp_path / "model.pkl"), "detectron2")
