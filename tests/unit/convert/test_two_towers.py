"""Contrastive models of open_clip and Hugging Face: the same features, and the same bits after a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import convert
from pipeline.config import validate
from pipeline.errors import CheckpointError, ConfigError
from pipeline.stages.base import DataFacts
from pipeline.stages.flip import FlipOptions, FlipStage
from tests.support.convert_peers import close, shaken

VISION = {"layers": 2, "width": 64, "head_width": 16, "image_size": 32, "patch_size": 8}
TEXT = {"context_length": 16, "width": 48, "heads": 3, "layers": 2}
CAPTIONS = ["a photo of a red circle", "two blue squares", "x"]


def open_clip_model(vision: dict[str, Any], text: dict[str, Any], custom: bool = False, **more: Any) -> Any:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    torch.manual_seed(0)
    cls = CustomTextCLIP if custom else CLIP
    return shaken(cls(32, CLIPVisionCfg(**(VISION | vision)), CLIPTextCfg(**(TEXT | text)), **more))


def config_of(vision: dict[str, Any], text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model_cfg": {"embed_dim": 32, "vision_cfg": VISION | vision, "text_cfg": TEXT | text, **more}}


def saved(folder: Path, model: Any, config: dict[str, Any]) -> str:
    """A folder as open_clip leaves it on the hub."""
    import json

    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, str(folder / "open_clip_model.safetensors"))
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return str(folder)


def images(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def same_features(stage: Any, peer: Any, pixels: Any) -> None:
    text = stage.tokenizer(CAPTIONS)
    with torch.no_grad():
        assert close(stage.embed_images(images()), peer.encode_image(pixels(images()), normalize=True))
        assert close(stage.embed_texts(text), peer.encode_text(text, normalize=True))


def clip_pixels(pictures: Tensor) -> Tensor:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (pictures / 255 - mean) / deviation


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "native": ({}, {}, {}),
    "openai": ({}, {}, {"quick_gelu": True}),
    "average": ({"pool_type": "avg", "no_ln_pre": True, "ls_init_value": 0.1}, {}, {}),
    "custom text": (
        {"norm_kwargs": {"eps": 1e-6}},
        {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        {"custom": True, "init_logit_bias": -10.0},
    ),
    "gelu by tanh": ({"act_kwargs": {"approximate": "tanh"}}, {"act_kwargs": {"approximate": "tanh"}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_open_clips_models_give_the_same_features_and_come_back_bit_for_bit(tmp_path: Path, case: str) -> None:
    vision, text, more = CASES[case]
    peer = open_clip_model(vision, text, **more)
    config = {"custom_text" if name == "custom" else name: value for name, value in more.items()}
    folder = saved(tmp_path / "theirs", peer, config_of(vision, text, **config))
    stage = convert.load(folder, "open_clip")
    same_features(stage, peer, clip_pixels)
    assert stage.options.loss == ("siglip" if case == "custom text" else "clip")
    weights = convert.read(folder, "open_clip")
    convert.save(weights, str(tmp_path / "again.pt"), "open_clip")
    again = torch.load(tmp_path / "again.pt", weights_only=True)["state_dict"]
    before = peer.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) and again[name].shape == before[name].shape for name in before)


@pytest.mark.parametrize("changes", [{}, {"pooling": "avg"}, {"loss": "siglip", "gelu": "tanh"}], ids=str)
def test_the_folder_written_is_what_open_clip_loads_as_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Of a stage as MAE's weights begin it: fixed positions, a bias in the patches, no norm before the blocks."""
    import open_clip

    options = dict(changes)
    gelu = {"gelu": options.pop("gelu")} if "gelu" in options else {}
    torch.manual_seed(0)
    model = {"width": 64, "depth": 2, "heads": 4, "image_size": 32, "patch_size": 8, **gelu}
    document = {"model": model, "text": TEXT | gelu, "embed_dim": 32, "pooling": "cls", **options}
    stage = shaken(FlipStage(validate(FlipOptions, document, where="test"), DataFacts()))
    convert.save(stage, str(tmp_path / "out") + "/", "open_clip")
    peer, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    normalize = preprocess.transforms[-1]
    same_features(stage, peer.eval(), lambda pictures: normalize(pictures / 255))
    assert peer.logit_scale.item() == pytest.approx(stage.logit_scale.item())
    again = convert.load(str(tmp_path / "out"), "open_clip")
    with torch.no_grad():
        assert close(again.embed_images(images()), stage.embed_images(images()))


def hf_model(**changes: Any) -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shared = {"num_hidden_layers": 2, "hidden_act": "quick_gelu", **changes}
    vision = {
        "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    text = {
        "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "max_position_embeddings": 16,
        "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407,
    }  # fmt: skip
    config = CLIPConfig(vision_config=vision | shared, text_config=text | shared, projection_dim=32)
    return shaken(CLIPModel(config))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_faces_clip_gives_the_same_features_and_comes_back_bit_for_bit(tmp_path: Path, activation: str) -> None:
    from transformers import CLIPModel

    peer = hf_model(hidden_act=activation)
    peer.save_pretrained(tmp_path / "theirs")
    stage = convert.load(str(tmp_path / "theirs"), "hf_clip")
    convert.save(stage, str(tmp_path / "ours") + "/", "hf_clip")
    again = CLIPModel.from_pretrained(tmp_path / "ours").eval()
    before, after = peer.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    text = stage.tokenizer(CAPTIONS)
    with torch.no_grad():
        for model in (peer, again):
            features = model(pixel_values=clip_pixels(images()), input_ids=text)
            assert close(stage.embed_images(images()), F.normalize(features.image_embeds, dim=-1))
            assert close(stage.embed_texts(text), F.normalize(features.text_embeds, dim=-1))


def test_a_siglip_model_of_timms_trunk_is_read(tmp_path: Path) -> None:
    """With attention pooling and no projection of images, as SigLIP's are."""
    import timm
    from open_clip.transformer import TextTransformer

    torch.manual_seed(0)
    trunk = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, class_token=False, global_pool="map",
        num_classes=0,
    )  # fmt: skip
    text = TextTransformer(
        **(TEXT | {"no_causal_mask": True}), output_dim=48, proj_bias=True, pool_type="last", vocab_size=49408
    )
    shaken(trunk), shaken(text)
    state = {f"visual.trunk.{name}": value for name, value in trunk.state_dict().items()}
    state |= {f"text.{name}": value for name, value in text.state_dict().items()}
    state |= {"logit_scale": torch.tensor(2.3), "logit_bias": torch.tensor(-10.0)}
    torch.save(state, tmp_path / "siglip.pt")
    import json

    tower = TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    vision = {"timm_model_name": "vit", "timm_pool": "map", "timm_proj": "none"}
    config = {"model_cfg": {"embed_dim": 48, "vision_cfg": vision, "text_cfg": tower, "custom_text": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    stage = convert.load(str(tmp_path / "siglip.pt"), "open_clip", heads=3)
    assert (stage.options.loss, stage.options.pooling, stage.options.projection) == ("siglip", "map", False)
    tokens = stage.tokenizer(CAPTIONS)
    with torch.no_grad():
        expected = F.normalize(trunk((images() / 255 - 0.5) / 0.5), dim=-1)
        assert close(stage.embed_images(images()), expected)
        assert close(stage.embed_texts(tokens), F.normalize(text(tokens), dim=-1))


def test_what_a_format_cannot_express_or_lacks_is_said(tmp_path: Path) -> None:
    stage = FlipStage(
        validate(
            FlipOptions,
            {
                "model": {"width": 64, "depth": 1, "heads": 4, "image_size": 32, "patch_size": 8},
                "text": TEXT | {"vocab_size": 1000},
                "embed_dim": 32,
            },
            where="test",
        ),
        DataFacts(),
    )
    with pytest.raises(ConfigError, match="byte-pair vocabulary of 1000 tokens"):
        convert.save(stage, str(tmp_path / "a.pt"), "open_clip")
    peer = open_clip_model({}, {})
    torch.save(peer.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ConfigError, match=r"don't tell heads and text_heads"):
        convert.load(str(tmp_path / "bare.pt"), "open_clip")
    same_features(convert.load(str(tmp_path / "bare.pt"), "open_clip", heads=4, text_heads=3), peer, clip_pixels)
    torch.save({"visual.conv1.weight": torch.zeros(8, 3, 4, 4)}, tmp_path / "broken.pt")
    with pytest.raises(CheckpointError, match="class_embedding"):
        convert.load(str(tmp_path / "broken.pt"), "open_clip")
