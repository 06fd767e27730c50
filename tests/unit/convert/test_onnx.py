"""ONNX graphs of Segment Anything beside the models they were made of, ours and the package's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from segment_anything.utils.onnx import SamOnnxModel

from pipeline import convert
from pipeline.config import validate
from pipeline.convert import onnx as onnx_files
from pipeline.convert.onnx import DECODER, DECODER_INPUTS, DECODER_OUTPUTS, ENCODER, drawn_prompts, export_sam, resizing
from pipeline.data.images.views import fitted
from pipeline.errors import ConfigError
from pipeline.models.sam.predictor import stored_logits
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts
from tests.support.sam_batches import tiny_stage
from tests.support.sam_models import HEADS, SIDE, official_sam, save_official


@pytest.mark.parametrize(("before", "after"), [(4, 16), (16, 5), (7, 7), (1, 9), (9, 1)])
def test_a_matrix_resizes_as_torch_does(before: int, after: int) -> None:
    x = torch.randn(3, before)
    wanted = torch.nn.functional.interpolate(x[None], after, mode="linear", align_corners=False)[0]
    matrix = resizing(torch.arange(after), before, torch.tensor(float(before)), after)
    torch.testing.assert_close(x @ matrix.T, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (11, 50), (200, 150), (1, 1)])
def test_masks_are_resized_as_the_predictor_does(size: tuple[int, int]) -> None:
    stage = tiny_stage()
    low = torch.randn(2, 4, 16, 16)
    wanted = stored_logits(low, fitted(*size, stage.options.model.image_hw))
    resized = onnx_files.OnnxDecoder(stage).stored(low, torch.tensor([float(side) for side in size]))
    torch.testing.assert_close(resized, wanted, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of the package's weights."""
    folder = tmp_path_factory.mktemp("onnx")
    stage = convert.load(save_official(official_sam(), folder), "segment_anything", decoder_heads=HEADS)
    done = export_sam(stage, str(folder / "graphs"))
    assert set(done.differences) == {"image_embeddings", *DECODER_OUTPUTS}
    assert max(done.differences.values()) <= 1e-5
    return folder / "graphs"


@pytest.mark.slow
def test_graphs_compute_what_the_packages_model_and_its_own_export_do(exported: Path) -> None:
    official = official_sam()
    images = torch.randn(2, 3, SIDE, SIDE)
    encoder = onnxruntime.InferenceSession(str(exported / ENCODER))
    (embeddings,) = encoder.run(None, {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(embeddings, official.image_encoder(images).numpy(), rtol=0, atol=1e-5)
    theirs = SamOnnxModel(official, return_single_mask=False)
    decoder = onnxruntime.InferenceSession(str(exported / DECODER))
    stage = convert.load(save_official(official, exported), "segment_anything", decoder_heads=HEADS)
    for points, size in ((2, (37, 50)), (5, (100, 64))):
        prompts = drawn_prompts(stage, 2, points, size)  # type: ignore[arg-type]
        outputs = decoder.run(None, {name: value.numpy() for name, value in zip(DECODER_INPUTS, prompts, strict=True)})
        for row in range(2):
            prompt = (prompts[0], *(part[row : row + 1] for part in prompts[1:5]), prompts[5])
            for ours, wanted in zip(outputs, theirs(*prompt), strict=True):
                np.testing.assert_allclose(ours[row : row + 1], wanted.numpy(), rtol=0, atol=1e-5)
    about = json.loads((exported / "sam.json").read_text())
    assert about["image_size"] == SIDE


def test_what_cannot_be_a_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tiny_stage()
    monkeypatch.setattr(onnx_files, "_NEEDED", ("onnx", "no_such_package_at_all"))
    with pytest.raises(ConfigError, match="no_such_package_at_all isn't installed"):
        export_sam(stage, str(tmp_path))
    mae = stage_class("mae")
    options = {"model": {"width": 16, "depth": 1, "heads": 1, "image_size": 8, "patch_size": 4}}
    with pytest.raises(ConfigError, match="only stage sam"):
        export_sam(mae(validate(mae.options_class, options, where="test"), DataFacts()), str(tmp_path))
    wide = {**stage.options.model.model_dump(), "image_size": (32, 64)}
    with pytest.raises(ConfigError, match="square"):
        export_sam(tiny_stage(model=wide), str(tmp_path))


@pytest.mark.slow
def test_fixed_positions_are_exported_and_the_model_goes_on_working(tmp_path: Path) -> None:
    from tests.support.sam_batches import MODEL, batch, objects

    stage = tiny_stage(model={**MODEL, "position_trained": False, "position_image_size": 16}).eval()
    done = export_sam(stage, str(tmp_path))
    assert max(done.differences.values()) <= 1e-5
    assert stage.predict(batch(objects((2, 3, 12, 14))))["area"][0, 0] == 110


@pytest.mark.slow
def test_graphs_that_compute_something_else_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tiny_stage().eval()
    other = tiny_stage(seed=1).eval()
    monkeypatch.setattr(onnx_files, "encoder_graph", lambda _: onnx_files._graph(
        onnx_files.OnnxEncoder(other), (torch.zeros(2, 3, 32, 32),), ("images",), ("image_embeddings",),
        ({0: torch.export.Dim("num_images")},),
    ))  # fmt: skip
    with pytest.raises(ConfigError, match="image_embeddings by"):
        export_sam(stage, str(tmp_path / "graphs"))
    assert not (tmp_path / "graphs").exists()
