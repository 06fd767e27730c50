"""The official MAE's files in and out: names, outputs, kinds, bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline import convert
from pipeline.convert.loading import load_initial
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.trunk.masking import masking_from_noise, take
from pipeline.models.trunk.pooling import pool
from pipeline.stages.base import DataFacts, Stage
from pipeline.stages.classify import ClassifyOptions, ClassifyStage
from pipeline.stages.flip import FlipOptions, FlipStage
from pipeline.stages.mae import MaeOptions, MaeStage
from pipeline.stages.probe import ProbeOptions, ProbeStage
from tests.support.convert_peers import close, pixels, shaken

MODEL = {"width": 48, "depth": 2, "heads": 3, "image_size": 32, "patch_size": 8}
TINY = {"model": MODEL, "decoder": {"width": 32, "depth": 1, "heads": 2}}
FACTS: dict[str, Any] = {"heads": 3, "decoder_heads": 2, "norm_pix": True}


class Official:
    """One recorded run of the official code."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            pytest.skip(f"no recorded outputs: {path.name}")
        record = np.load(path)
        self.state = {name[3:]: torch.from_numpy(record[name]) for name in record.files if name.startswith("sd.")}
        self.images, self.noise, self.pred, self.latent = (
            torch.from_numpy(record[name]) for name in ("images", "noise", "pred", "latent")
        )
        self.loss = float(record["loss"])
        _, _, _, _, heads, _, _, decoder_heads, _, norm_pix = (int(value) for value in record["config"])
        self.known = {"heads": heads, "decoder_heads": decoder_heads, "norm_pix": bool(norm_pix)}


@pytest.fixture(params=["mae_official_tiny", "mae_official_tiny_pixels"])
def official(request: pytest.FixtureRequest, shared: Path) -> Official:
    return Official(shared / "reference" / "fixtures" / f"{request.param}.npz")


def pickled(state: dict[str, Tensor], path: Path, **beside: Any) -> str:
    torch.save({"model": state, **beside}, path)
    return str(path)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_full_file_predicts_what_the_official_code_recorded(official: Official, tmp_path: Path) -> None:
    stage = convert.load(pickled(official.state, tmp_path / "full.pth"), "mae", **official.known)
    assert isinstance(stage, MaeStage)
    assert stage.options.model.position == "sincos2d"
    assert stage.options.norm_pix == official.known["norm_pix"]
    masking = masking_from_noise(official.noise, official.latent.shape[1] - 1)
    tokens = stage.trunk(official.images, keep=masking.keep)
    assert close(torch.cat([tokens.prefix, tokens.patches], 1), official.latent)
    prediction = stage.predict_patches(official.images, masking)
    assert close(prediction, take(official.pred, masking.masked))
    assert float(stage.errors(official.images, masking, prediction).detach().mean()) == pytest.approx(
        official.loss, rel=1e-5
    )


def test_a_full_file_comes_back_bit_for_bit(official: Official, tmp_path: Path) -> None:
    stage = convert.load(pickled(official.state, tmp_path / "full.pth"), "mae", **official.known)
    convert.save(stage, str(tmp_path / "again.pth"), "mae")
    assert same(torch.load(tmp_path / "again.pth", weights_only=True)["model"], official.state)


def test_an_encoder_alone_is_an_mae_whose_decoder_starts_anew(official: Official, tmp_path: Path) -> None:
    encoder = {k: v for k, v in official.state.items() if not k.startswith(("decoder_", "mask_token"))}
    path = pickled(encoder, tmp_path / "encoder.pth")
    weights = convert.read(path, "mae", heads=official.known["heads"])
    stage, report = convert.build(weights)
    assert isinstance(stage, MaeStage)
    assert all(name.startswith("decoder.") for name in report.new)
    assert len(report.loaded) == len(encoder) - 1  # the position table is a fixed one
    full = convert.load(pickled(official.state, tmp_path / "full.pth"), "mae", **official.known)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert isinstance(full, MaeStage)
    assert torch.equal(stage.encode(images).patches, full.encode(images).patches)
    for format_name in ("mae", "mae_encoder"):
        convert.save(weights, str(tmp_path / "again.pth"), format_name)
        assert same(torch.load(tmp_path / "again.pth", weights_only=True)["model"], encoder)


def test_the_encoder_can_be_taken_out_of_a_full_file(official: Official, tmp_path: Path) -> None:
    path = pickled(official.state, tmp_path / "full.pth")
    weights = convert.read(path, "mae_encoder", heads=official.known["heads"])
    assert "decoder_pred.weight" in weights.ignored
    _, report = convert.build(weights)
    assert set(report.ignored) == set(weights.ignored)


def test_what_a_full_files_tensors_do_not_tell_is_asked_for_at_once(official: Official, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="heads and decoder_heads and norm_pix"):
        convert.load(pickled(official.state, tmp_path / "full.pth"), "mae")


def test_training_arguments_in_the_file_answer(official: Official, tmp_path: Path) -> None:
    arguments = argparse.Namespace(norm_pix_loss=official.known["norm_pix"], blr=1.5e-4)
    path = pickled(official.state, tmp_path / "full.pth", args=arguments, epoch=3)
    known = {name: value for name, value in official.known.items() if name != "norm_pix"}
    stage = convert.load(path, "mae", **known)
    assert isinstance(stage, MaeStage)
    assert stage.options.norm_pix == official.known["norm_pix"]


def fine_tuned(*, average: bool) -> VisionTransformer:
    """The official fine-tuning model is timm's with `fc_norm` instead of `norm` when it averages."""
    pooling = {"global_pool": "avg", "fc_norm": True} if average else {"global_pool": "token"}
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return shaken(VisionTransformer(**shape, **pooling))


@pytest.mark.parametrize("average", [True, False])
def test_a_fine_tuned_file_classifies_alike_and_comes_back(average: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    peer = fine_tuned(average=average)
    stage = convert.load(pickled(peer.state_dict(), tmp_path / "tuned.pth"), "mae", heads=3)
    assert isinstance(stage, ClassifyStage)
    assert stage.options.pooling == ("avg" if average else "cls")
    convert.save(stage, str(tmp_path / "again.pth"), "mae")
    assert same(torch.load(tmp_path / "again.pth", weights_only=True)["model"], peer.state_dict())
    stage, peer, images = stage.to(dtype), peer.to(dtype), pixels(32, 32, dtype)
    scores = stage.head(stage.fc_norm(pool(stage.trunk(images), stage.options.pooling)))
    assert close(scores, peer(images))


def probed() -> VisionTransformer:
    """main_linprobe.py's model."""
    peer = fine_tuned(average=False)
    norm = nn.BatchNorm1d(48, affine=False, eps=1e-6)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked.fill_(17)
    peer.head = nn.Sequential(norm, peer.head)
    return peer.eval()


def test_a_linear_probe_classifies_alike_and_comes_back(tmp_path: Path) -> None:
    peer = probed()
    stage = convert.load(pickled(peer.state_dict(), tmp_path / "probe.pth"), "mae", heads=3)
    assert isinstance(stage, ProbeStage)
    images = pixels(32, 32)
    features = stage.feature_norm(pool(stage.trunk(images), "cls"), torch.ones(2))
    assert close(stage.heads[0](features), peer(images))
    convert.save(stage, str(tmp_path / "again.pth"), "mae")
    assert same(torch.load(tmp_path / "again.pth", weights_only=True)["model"], peer.state_dict())


def test_of_several_probe_heads_one_must_be_chosen(tmp_path: Path) -> None:
    options = ProbeOptions.model_validate({"model": MODEL, "lr_multipliers": (0.1, 1.0)})
    stage = shaken(ProbeStage(options, DataFacts(("a", "b"))))
    with pytest.raises(ConfigError, match="probe_head"):
        convert.save(stage, str(tmp_path / "probe.pth"), "mae")
    saved = convert.save(stage, str(tmp_path / "probe.pth"), "mae", probe_head=1)
    assert saved.dropped == ("heads.0.weight", "heads.0.bias")
    state = torch.load(tmp_path / "probe.pth", weights_only=True)["model"]
    assert torch.equal(state["head.1.weight"], stage.heads[1].weight)
    with pytest.raises(CheckpointError, match="no head 2"):
        convert.save(stage, str(tmp_path / "probe.pth"), "mae", probe_head=2)


def test_a_flip_stage_leaves_its_encoder(tmp_path: Path) -> None:
    text = {"width": 16, "heads": 2, "layers": 1, "context_length": 8}
    stage = shaken(FlipStage(FlipOptions.model_validate({"model": MODEL, "text": text}), DataFacts()))
    saved = convert.save(stage, str(tmp_path / "encoder.pth"), "mae")
    assert "logit_scale" in saved.dropped
    again = convert.read(str(tmp_path / "encoder.pth"), "mae", heads=3)
    assert same(again.state, {k: v for k, v in stage.state_dict().items() if k.startswith("trunk.")})


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (3, 5)])
def test_a_fixed_table_tells_its_grid(grid: tuple[int, int], tmp_path: Path) -> None:
    options = MaeOptions.model_validate({**TINY, "model": {**MODEL, "image_size": (8 * grid[0], 8 * grid[1])}})
    stage = shaken(MaeStage(options, DataFacts()))
    convert.save(stage, str(tmp_path / "own.safetensors"), "timm")
    weights = convert.read(str(tmp_path / "own.safetensors"), "timm", heads=3)
    rebuilt, _ = convert.build(weights)
    assert rebuilt.trunk.config.grid == grid
    assert weights.options["model"]["position"] == "sincos2d"


def test_other_sizes_resize_positions_without_antialiasing(tmp_path: Path) -> None:
    """Trap 12, as util/pos_embed.py's interpolate_pos_embed does it."""
    peer = fine_tuned(average=True)
    stage = convert.load(pickled(peer.state_dict(), tmp_path / "tuned.pth"), "mae", heads=3)
    assert isinstance(stage, ClassifyStage)
    table = peer.state_dict()["pos_embed"]
    image = table[:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(image, size=(2, 2), mode="bicubic", align_corners=False)
    small = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, global_pool="avg", fc_norm=True
    )
    state = peer.state_dict() | {"pos_embed": torch.cat([table[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], 1)}
    small.load_state_dict(state)
    images = pixels(16, 16)
    scores = stage.head(stage.fc_norm(pool(stage.trunk(images), "avg")))
    assert close(scores, small.eval()(images))


def test_a_trunk_of_another_grid_takes_the_table_resized(tmp_path: Path) -> None:
    path = pickled(fine_tuned(average=True).state_dict(), tmp_path / "tuned.pth")
    weights = convert.read(path, "mae", heads=3)
    model = {**MODEL, "image_size": 48, "position": "learned"}
    stage = ClassifyStage(ClassifyOptions.model_validate({"model": model}), DataFacts(("a", "b")))
    report = load_initial(stage, weights.state, ["trunk."], where=path)
    assert report.resized == ["trunk.pos_embed"]
    assert "head.weight" in report.ignored
    assert "head.weight" in report.new


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gelu": "tanh"}, "tanh GELU"),
        ({"norm_eps": 1e-5}, "epsilon"),
        ({"registers": 2}, "register"),
        ({"cls_token": False}, "cls token"),
        ({"image_size": (16, 32)}, "grid"),
    ],
)
def test_a_model_that_the_official_code_would_run_differently_is_not_written(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    stage: Stage = MaeStage(MaeOptions.model_validate({**TINY, "model": {**MODEL, **changes}}), DataFacts())
    with pytest.raises(ConfigError, match=words):
        convert.save(stage, str(tmp_path / "own.pth"), "mae")
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_with_positions_of_its_own_is_refused(tmp_path: Path) -> None:
    stage = MaeStage(MaeOptions.model_validate(TINY), DataFacts())
    convert.save(stage, str(tmp_path / "own.pth"), "mae")
    state = torch.load(tmp_path / "own.pth", weights_only=True)["model"]
    state["decoder_pos_embed"][0, 3, 1] += 0.01
    with pytest.raises(CheckpointError, match="decoder_pos_embed"):
        convert.load(pickled(state, tmp_path / "own.pth"), "mae", **FACTS)
