"""Hugging Face's ViTMAE and ViT in and out: the same outputs, the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from pipeline import convert
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.trunk.masking import masking_from_noise, take
from pipeline.models.trunk.pooling import pool
from pipeline.stages.base import DataFacts
from pipeline.stages.classify import ClassifyOptions, ClassifyStage
from pipeline.stages.mae import MaeOptions, MaeStage
from tests.support.convert_peers import close, pixels, shaken

SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}
# Eager attention computes its softmax in fp32 whatever the model's precision.
SDPA = {"attn_implementation": "sdpa"}


def autoencoder(**options: Any) -> ViTMAEForPreTraining:
    """With the fixed tables that released weights have: transformers 5 leaves a new model's at zero."""
    peer = ViTMAEForPreTraining(ViTMAEConfig(**SHAPE, **DECODER, **SDPA, **options))
    peer.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    peer.vit.embeddings.initialize_weights()
    peer.decoder.initialize_weights(16)
    return shaken(peer)


def classifier(**options: Any) -> ViTForImageClassification:
    return shaken(ViTForImageClassification(ViTConfig(**{**SHAPE, **SDPA, "num_labels": 5, **options})))


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("norm_pix", [True, False])
def test_an_autoencoder_predicts_alike(norm_pix: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    peer = autoencoder(norm_pix_loss=norm_pix)
    peer.save_pretrained(tmp_path)
    stage = convert.load(str(tmp_path), "hf_vit_mae")  # config.json tells what tensors don't
    assert isinstance(stage, MaeStage)
    stage, peer = stage.to(dtype), peer.to(dtype)
    images, noise = pixels(32, 32, dtype), torch.rand(2, 16)
    theirs = peer(images, noise=noise)
    masking = masking_from_noise(noise, 4)
    prediction = stage.predict_patches(images, masking)
    assert close(prediction, take(theirs.logits, masking.masked))
    assert close(stage.errors(images, masking, prediction).mean(), theirs.loss)


@pytest.mark.parametrize("spelling", ["modules", "files"])
def test_both_spellings_are_read_and_the_bits_come_back(spelling: str, tmp_path: Path) -> None:
    peer = autoencoder()
    peer.save_pretrained(tmp_path / "peer")
    if spelling == "modules":
        safetensors.torch.save_file(dict(peer.state_dict()), tmp_path / "peer" / "model.safetensors")
    stage = convert.load(str(tmp_path / "peer"), "hf_vit_mae")
    convert.save(stage, str(tmp_path / "again"), "hf_vit_mae")
    again, loading = ViTMAEForPreTraining.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    for name, value in peer.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    images, noise = pixels(32, 32), torch.rand(2, 16)
    again.set_attn_implementation("sdpa")
    assert torch.equal(again.eval()(images, noise=noise).loss, peer(images, noise=noise).loss)


def test_tables_that_transformers_computes_are_known_as_fixed(tmp_path: Path) -> None:
    autoencoder().save_pretrained(tmp_path)
    assert convert.read(str(tmp_path), "hf_vit_mae").options["model"]["position"] == "sincos2d"


def test_a_decoder_with_tables_left_at_zero_is_refused(tmp_path: Path) -> None:
    peer = autoencoder()
    peer.decoder.decoder_pos_embed.data.zero_()
    peer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="decoder_pos_embed"):
        convert.load(str(tmp_path), "hf_vit_mae")


def test_files_have_the_names_that_hubs_have(tmp_path: Path) -> None:
    convert.save(shaken(MaeStage(MaeOptions.model_validate(OURS), DataFacts())), str(tmp_path / "ours"), "hf_vit_mae")
    names = set(on_disk(tmp_path / "ours"))
    assert "vit.encoder.layer.1.attention.attention.query.weight" in names
    assert "vit.encoder.layer.0.attention.output.dense.bias" in names
    assert "decoder.decoder_layers.0.intermediate.dense.weight" in names


OURS = {
    "model": {"width": 48, "depth": 2, "heads": 3, "image_size": 32, "patch_size": 8},
    "decoder": {"width": 32, "depth": 1, "heads": 2},
}


def test_our_autoencoder_predicts_alike_in_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    stage = shaken(MaeStage(MaeOptions.model_validate(OURS), DataFacts()))
    convert.save(stage, str(tmp_path), "hf_vit_mae")
    peer = ViTMAEForPreTraining.from_pretrained(tmp_path, **SDPA).eval().to(dtype)
    stage = stage.to(dtype)
    images, noise = pixels(32, 32, dtype), torch.rand(2, 16)
    masking = masking_from_noise(noise, 4)
    assert close(stage.predict_patches(images, masking), take(peer(images, noise=noise).logits, masking.masked))
    again = convert.load(str(tmp_path), "hf_vit_mae")
    assert all(torch.equal(again.state_dict()[name], value.float()) for name, value in stage.state_dict().items())


def test_an_encoder_alone_comes_back(tmp_path: Path) -> None:
    peer = shaken(ViTMAEModel(ViTMAEConfig(**SHAPE)))
    peer.save_pretrained(tmp_path / "peer")
    weights = convert.read(str(tmp_path / "peer"), "hf_vit_mae")
    _, report = convert.build(weights)
    assert all(name.startswith("decoder.") for name in report.new)
    convert.save(weights, str(tmp_path / "again"), "hf_vit_mae")
    first, second = on_disk(tmp_path / "peer"), on_disk(tmp_path / "again")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_a_classifier_gives_the_same_scores(act: str, dtype: torch.dtype, tmp_path: Path) -> None:
    peer = classifier(hidden_act=act, id2label={i: name for i, name in enumerate("abcde")})
    peer.save_pretrained(tmp_path)
    stage = convert.load(str(tmp_path), "hf_vit").to(dtype)
    assert isinstance(stage, ClassifyStage)
    assert stage.data.classes == tuple("abcde")
    images = pixels(32, 32, dtype)
    assert close(stage.head(pool(stage.trunk(images), "cls")), peer.to(dtype)(images).logits)


def test_a_classifier_comes_back_bit_for_bit(tmp_path: Path) -> None:
    peer = classifier()
    peer.save_pretrained(tmp_path / "peer")
    convert.save(convert.load(str(tmp_path / "peer"), "hf_vit"), str(tmp_path / "again"), "hf_vit")
    first, second = on_disk(tmp_path / "peer"), on_disk(tmp_path / "again")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = ViTForImageClassification.from_pretrained(tmp_path / "again", **SDPA).eval()
    assert torch.equal(again(pixels(32, 32)).logits, peer(pixels(32, 32)).logits)
    assert again.config.id2label == peer.config.id2label


def test_features_without_a_head(tmp_path: Path) -> None:
    peer = shaken(ViTModel(ViTConfig(**SHAPE, **SDPA)))
    peer.save_pretrained(tmp_path / "peer")
    weights = convert.read(str(tmp_path / "peer"), "hf_vit")
    assert sorted(weights.ignored) == ["pooler.dense.bias", "pooler.dense.weight"]
    stage, _ = convert.build(weights)
    tokens = stage.trunk(pixels(32, 32))
    assert close(torch.cat([tokens.prefix, tokens.patches], 1), peer(pixels(32, 32)).last_hidden_state)
    convert.save(weights, str(tmp_path / "again"), "hf_vit")
    again = ViTModel.from_pretrained(tmp_path / "again", add_pooling_layer=False, **SDPA).eval()
    assert torch.equal(again(pixels(32, 32)).last_hidden_state, peer(pixels(32, 32)).last_hidden_state)


def test_other_sizes_resize_positions_without_antialiasing(tmp_path: Path) -> None:
    """Trap 12, the other way round than timm."""
    peer = classifier()
    peer.save_pretrained(tmp_path)
    stage = convert.load(str(tmp_path), "hf_vit")
    images = pixels(16, 24)
    theirs = peer(images, interpolate_pos_encoding=True).logits
    assert isinstance(stage, ClassifyStage)
    assert close(stage.head(pool(stage.trunk(images), "cls")), theirs)
    stage.trunk.config = stage.trunk.config.model_copy(update={"interpolation": "bicubic_antialias"})
    assert not close(stage.head(pool(stage.trunk(images), "cls")), theirs)


def test_without_config_json_the_facts_are_asked_for(tmp_path: Path) -> None:
    autoencoder().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="heads and decoder_heads and norm_pix"):
        convert.load(str(tmp_path), "hf_vit_mae")
    stage = convert.load(str(tmp_path / "model.safetensors"), "hf_vit_mae", heads=3, decoder_heads=2, norm_pix=False)
    assert stage.trunk.config.norm_eps == 1e-12


def test_what_is_known_wins_over_config_json(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    assert convert.load(str(tmp_path), "hf_vit", heads=6).trunk.config.heads == 6


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "swish"}))
    with pytest.raises(CheckpointError, match="swish"):
        convert.load(str(tmp_path), "hf_vit")


def test_a_model_without_biases_is_refused(tmp_path: Path) -> None:
    classifier(qkv_bias=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"qkv\.bias"):
        convert.load(str(tmp_path), "hf_vit")


def test_a_lost_part_of_query_key_value_is_named(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    state = on_disk(tmp_path)
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="query, key and value"):
        convert.load(str(tmp_path), "hf_vit")


def test_average_pooling_is_not_written_as_a_classifier_by_cls(tmp_path: Path) -> None:
    stage = ClassifyStage(ClassifyOptions.model_validate({"model": OURS["model"]}), DataFacts(("a", "b")))
    with pytest.raises(ConfigError, match="average pooling"):
        convert.save(stage, str(tmp_path / "out"), "hf_vit")


def test_shards_are_read_and_none_outside_the_folder(tmp_path: Path) -> None:
    peer = classifier()
    peer.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    stage = convert.load(str(tmp_path), "hf_vit")
    assert isinstance(stage, ClassifyStage)
    assert close(stage.head(pool(stage.trunk(pixels(32, 32)), "cls")), peer(pixels(32, 32)).logits)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside"):
        convert.load(str(tmp_path), "hf_vit")
