"""timm's ViT in and out: the same outputs, the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from pipeline import convert
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.trunk.pooling import pool
from pipeline.stages.base import DataFacts
from pipeline.stages.classify import ClassifyStage
from pipeline.stages.mae import MaeOptions, MaeStage
from tests.support.convert_peers import close, pixels, shaken

SHAPE = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def vit(**options: Any) -> VisionTransformer:
    return shaken(VisionTransformer(**{"img_size": 32, "num_classes": 5, **SHAPE, **options}))


def saved(model: nn.Module, path: Path) -> str:
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return str(path)


def scores(stage: ClassifyStage, images: torch.Tensor) -> torch.Tensor:
    """As `ClassifyStage.scores`, from normalised pixels and in the weights' own precision."""
    return stage.head(stage.fc_norm(pool(stage.trunk(images), stage.options.pooling)))


VARIANTS = {
    "cls": {},
    "average": {"global_pool": "avg"},
    "no cls": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "odd sizes": {"img_size": (24, 40), "mlp_ratio": 2.5},
    "tanh": {"act_layer": "gelu_tanh"},
}
KNOWN: dict[str, dict[str, Any]] = {"odd sizes": {"image_size": [24, 40]}, "tanh": {"gelu": "tanh"}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal_timms(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    peer = vit(**VARIANTS[variant])
    stage = convert.load(saved(peer, tmp_path / "peer.safetensors"), "timm", heads=3, **KNOWN.get(variant, {}))
    assert isinstance(stage, ClassifyStage)
    images = pixels(*(24, 40) if variant == "odd sizes" else (32, 32), dtype)
    assert close(scores(stage.to(dtype), images), peer.to(dtype)(images))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_round_trip_keeps_every_bit_and_the_arguments_build_the_model(variant: str, tmp_path: Path) -> None:
    peer = vit(**VARIANTS[variant])
    stage = convert.load(saved(peer, tmp_path / "peer.safetensors"), "timm", heads=3, **KNOWN.get(variant, {}))
    convert.save(stage, str(tmp_path / "again.safetensors"), "timm")
    again = safetensors.torch.load_file(tmp_path / "again.safetensors")
    assert set(again) == set(peer.state_dict())
    assert all(torch.equal(again[name], value) for name, value in peer.state_dict().items())
    written = convert.FORMATS["timm"].write(convert.weights.of_stage(stage), convert.weights.Known())
    rebuilt = VisionTransformer(**written.config["arguments"])
    rebuilt.load_state_dict(again, strict=True)
    images = pixels(*(24, 40) if variant == "odd sizes" else (32, 32))
    assert torch.equal(rebuilt.eval()(images), peer(images))


def test_positions_of_registers_move_into_the_tokens(tmp_path: Path) -> None:
    peer = vit(reg_tokens=2)
    stage = convert.load(saved(peer, tmp_path / "peer.safetensors"), "timm", heads=3)
    assert isinstance(stage, ClassifyStage)
    images = pixels(32, 32)
    assert close(scores(stage, images), peer(images))
    convert.save(stage, str(tmp_path / "again.safetensors"), "timm")
    rebuilt = vit(reg_tokens=2)
    rebuilt.load_state_dict(safetensors.torch.load_file(tmp_path / "again.safetensors"))
    assert close(rebuilt(images), peer(images))


def test_a_model_without_head_gives_its_features(dtype: torch.dtype, tmp_path: Path) -> None:
    peer = vit(num_classes=0)
    stage = convert.load(saved(peer, tmp_path / "peer.safetensors"), "timm", heads=3).to(dtype)
    assert isinstance(stage, MaeStage)
    tokens = stage.trunk(pixels(32, 32, dtype))
    theirs = peer.to(dtype).forward_features(pixels(32, 32, dtype))
    assert close(torch.cat([tokens.prefix, tokens.patches], dim=1), theirs)


def test_other_sizes_resize_positions_with_antialiasing(tmp_path: Path) -> None:
    """Trap 12: the other way gives visibly other features, so this tells them apart."""
    peer = vit(img_size=64, dynamic_img_size=True)
    stage = convert.load(saved(peer, tmp_path / "peer.safetensors"), "timm", heads=3)
    assert isinstance(stage, ClassifyStage)
    images = pixels(32, 48)
    theirs = peer(images)
    assert close(scores(stage, images), theirs)
    stage.trunk.config = stage.trunk.config.model_copy(update={"interpolation": "bicubic"})
    assert not close(scores(stage, images), theirs)


def test_sizes_and_names_of_sizes_come_from_the_tensors(tmp_path: Path) -> None:
    peer = VisionTransformer(img_size=64, patch_size=32, embed_dim=192, depth=12, num_heads=3, num_classes=7)
    weights = convert.read(saved(peer, tmp_path / "peer.safetensors"), "timm", heads=3)
    assert weights.stage == "classify"
    assert weights.options["model"]["size"] == "Ti"
    assert (weights.options["model"]["image_size"], weights.options["model"]["patch_size"]) == (64, 32)
    assert len(weights.classes) == 7


def test_heads_are_asked_for_with_a_hint(tmp_path: Path) -> None:
    peer = VisionTransformer(img_size=64, patch_size=32, embed_dim=192, depth=12, num_heads=3, num_classes=7)
    with pytest.raises(ConfigError, match=r"heads=.*ViT-Ti has 3"):
        convert.load(saved(peer, tmp_path / "peer.safetensors"), "timm")


def test_a_grid_that_is_not_square_is_asked_for(tmp_path: Path) -> None:
    path = saved(vit(img_size=(24, 40)), tmp_path / "peer.safetensors")
    with pytest.raises(ConfigError, match="image_size"):
        convert.load(path, "timm", heads=3)
    with pytest.raises(CheckpointError, match="image_size 24x24"):
        convert.load(path, "timm", heads=3, image_size=24)


def test_a_table_without_a_row_for_cls_is_read_once_the_size_is_known(tmp_path: Path) -> None:
    peer = vit(no_embed_class=True)
    path = saved(peer, tmp_path / "peer.safetensors")
    with pytest.raises(ConfigError, match="image_size"):
        convert.load(path, "timm", heads=3)
    stage = convert.load(path, "timm", heads=3, image_size=32)
    assert isinstance(stage, ClassifyStage)
    assert close(scores(stage, pixels(32, 32)), peer(pixels(32, 32)))


def test_an_mae_written_for_timm_has_no_mask_token_or_decoder(tmp_path: Path) -> None:
    """Trap 14: timm takes any file with a mask token for DINOv2."""
    options = MaeOptions.model_validate(
        {
            "model": {"width": 48, "depth": 2, "heads": 3, "image_size": 32, "patch_size": 8},
            "decoder": {"width": 32, "depth": 1, "heads": 2},
        }
    )
    stage = shaken(MaeStage(options, DataFacts()))
    saved_as = convert.save(stage, str(tmp_path / "timm.pth"), "timm")
    assert "decoder.mask_token" in saved_as.dropped
    state = torch.load(tmp_path / "timm.pth", weights_only=True)
    peer = VisionTransformer(img_size=32, num_classes=0, **SHAPE)
    peer.load_state_dict(checkpoint_filter_fn(state, peer), strict=True)
    tokens = stage.trunk(pixels(32, 32))
    assert close(torch.cat([tokens.prefix, tokens.patches], 1), peer.eval().forward_features(pixels(32, 32)))


def test_a_full_mae_file_is_not_taken_for_timms(tmp_path: Path) -> None:
    state = {**vit().state_dict(), "mask_token": torch.zeros(1, 1, 32)}
    safetensors.torch.save_file(state, tmp_path / "peer.safetensors")
    with pytest.raises(CheckpointError, match="format mae"):
        convert.load(str(tmp_path / "peer.safetensors"), "timm", heads=3)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"init_values": 0.1}, "gamma"), ({"qk_norm": True}, "q_norm"), ({"pre_norm": True}, "norm_pre")],
)
def test_a_variant_that_the_trunk_lacks_is_refused_by_name(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"holds trunk\..*{word}"):
        convert.load(saved(vit(**options), tmp_path / "peer.safetensors"), "timm", heads=3)


def test_a_model_that_averages_without_fc_norm_and_cls_is_refused(tmp_path: Path) -> None:
    peer = vit(global_pool="avg", class_token=False, fc_norm=False)
    with pytest.raises(CheckpointError, match="averages after"):
        convert.load(saved(peer, tmp_path / "peer.safetensors"), "timm", heads=3)
