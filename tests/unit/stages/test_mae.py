"""Stage `mae`: the official code's recorded numbers, Hugging Face's, and what can be done with a trained one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import validate
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError
from pipeline.losses.reconstruction import normalize_patches
from pipeline.models.pixels import denormalize, normalize, patchify, unpatchify
from pipeline.models.trunk.masking import mask_picture, masking_from_mask, masking_from_noise
from pipeline.models.trunk.position import sincos2d
from pipeline.stages.base import DataFacts
from pipeline.stages.mae import MaeOptions, MaeStage

MODEL = {"width": 48, "depth": 3, "heads": 4, "image_size": 64, "patch_size": 8}
SHARED = Path(os.environ.get("VITRAIL_SHARED", Path(__file__).parents[4] / "shared"))


def build(**changes: object) -> MaeStage:
    torch.manual_seed(0)
    document = {"model": MODEL, "decoder": {"width": 32, "depth": 2, "heads": 4}} | changes
    return MaeStage(validate(MaeOptions, document, where="test"), DataFacts(classes=("a", "b")))


def batch_of(num: int = 4, size: tuple[int, int] = (64, 64), **changes: object) -> Batch:
    images = torch.randint(0, 256, (num, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    fields = {"ids": torch.arange(num), "seeds": torch.arange(num) + 100, "weight": torch.ones(num)}
    return Batch(**(fields | {"position": 0, "images": images} | changes))


def official(state: dict[str, Tensor], stage: MaeStage) -> None:
    """Load a state dict of the official MAE; its position tables are constants here, and must be equal."""
    for key, width in (("pos_embed", 48), ("decoder_pos_embed", 32)):
        table = state.pop(key)
        assert not table[0, 0].any()
        torch.testing.assert_close(table[0, 1:], sincos2d((8, 8), width), atol=1e-6, rtol=0)
    renamed = {f"decoder.{k}" if k.startswith(("decoder", "mask_token")) else f"trunk.{k}": v for k, v in state.items()}
    stage.load_state_dict(renamed, strict=True)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` of the largest magnitude."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize(("name", "depth", "decoder_depth"), [("tiny", 3, 2), ("tiny_pixels", 2, 1)])
def test_equals_the_official_code(name: str, depth: int, decoder_depth: int) -> None:
    path = SHARED / "reference" / "fixtures" / f"mae_official_{name}.npz"
    if not path.exists():
        pytest.skip(f"no recorded outputs at {path}")
    recorded = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    decoder = {"width": 32, "depth": decoder_depth, "heads": 4}
    stage = build(model=MODEL | {"depth": depth}, decoder=decoder, norm_pix=name == "tiny")
    official({k.removeprefix("sd."): v for k, v in recorded.items() if k.startswith("sd.")}, stage)

    masking = masking_from_noise(recorded["noise"], 16)
    assert torch.equal(mask_picture(masking).float(), recorded["mask"])
    tokens = stage.trunk(recorded["images"], keep=masking.keep)
    close(torch.cat([tokens.prefix, tokens.patches], 1), recorded["latent"], 1e-5)
    prediction = stage.predict_patches(recorded["images"], masking)
    index = masking.masked.unsqueeze(-1).expand(-1, -1, 192)
    close(prediction, recorded["pred"].gather(1, index), 1e-5)
    loss = stage.errors(recorded["images"], masking, prediction).mean()
    close(loss, recorded["loss"], 1e-5)

    loss.backward()
    gradients = {name: parameter.grad for name, parameter in stage.named_parameters()}
    for key in [k.removeprefix("grad.") for k in recorded if k.startswith("grad.")]:
        ours = gradients[f"decoder.{key}" if key.startswith(("decoder", "mask_token")) else f"trunk.{key}"]
        assert ours is not None
        close(ours, recorded[f"grad.{key}"], 1e-5)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_equals_hugging_face_in_float64_on_an_odd_grid(norm_pix: bool) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    stage = build(model=MODEL | {"image_size": (40, 40)}, norm_pix=norm_pix).double()
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, image_size=(40, 40),
            patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
            decoder_intermediate_size=128, mask_ratio=0.75, norm_pix_loss=norm_pix, layer_norm_eps=1e-6,
            attn_implementation="sdpa",  # the eager one takes its softmax in fp32
        )
    ).double()  # fmt: skip
    theirs.load_state_dict(_as_hugging_face(stage, theirs.state_dict()), strict=True)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(3, 3, 40, 40, generator=generator, dtype=torch.float64)
    noise = torch.rand(3, 25, generator=generator)

    expected = theirs(pixel_values=images, noise=noise)
    masking = masking_from_noise(noise, 6)
    prediction = stage.predict_patches(images, masking)
    close(prediction, expected.logits.gather(1, masking.masked.unsqueeze(-1).expand(-1, -1, 192)), 1e-9)
    loss = stage.errors(images, masking, prediction).mean()
    close(loss, expected.loss, 1e-9)
    loss.backward()
    expected.loss.backward()
    close(stage.trunk.cls_token.grad, theirs.vit.embeddings.cls_token.grad, 1e-9)
    projection = theirs.vit.embeddings.patch_embeddings.projection
    close(stage.trunk.patch_embed.proj.weight.grad, projection.weight.grad, 1e-9)
    close(stage.decoder.mask_token.grad, theirs.decoder.mask_token.grad, 1e-9)


def _as_hugging_face(stage: MaeStage, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under their names; found by following their layout, whatever the release calls its parts."""
    ours = stage.state_dict()
    renamed: dict[str, Tensor] = {}
    for key, value in theirs.items():
        if key.endswith(("position_embeddings", "decoder_pos_embed")):
            width = value.shape[-1]
            renamed[key] = torch.cat([torch.zeros(1, width), sincos2d((5, 5), width)]).unsqueeze(0).double()
            continue
        name = key.replace("vit.embeddings.patch_embeddings.projection", "trunk.patch_embed.proj")
        name = name.replace("vit.embeddings.cls_token", "trunk.cls_token").replace("vit.layernorm", "trunk.norm")
        name = name.replace("vit.encoder.layer.", "trunk.blocks.").replace("vit.layers.", "trunk.blocks.")
        name = name.replace("decoder.decoder_layers.", "decoder.decoder_blocks.")
        for theirs_part, ours_part in (
            ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.output.dense", "attn.proj"),
            ("attention.o_proj", "attn.proj"), ("intermediate.dense", "mlp.fc1"), ("mlp.fc1", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):  # fmt: skip
            if theirs_part in name:
                name = name.replace(theirs_part, ours_part)
                break
        for i, part in enumerate(("query", "key", "value")):
            for spelled in (f"attention.attention.{part}.", f"attention.{part[0]}_proj."):
                if spelled in name:
                    fused = ours[name.replace(spelled, "attn.qkv.")]
                    renamed[key] = fused.chunk(3)[i]
        if key not in renamed:
            renamed[key] = ours[name]
    return renamed


def test_flat_patches_have_finite_loss_and_the_epsilon_is_inside_the_root() -> None:
    flat = torch.full((1, 1, 192), 0.5, dtype=torch.float64)
    flat[0, 0, 0] += 1e-4
    variance = flat.var(unbiased=True)
    expected = (flat - flat.mean()) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(normalize_patches(flat), expected, rtol=1e-12, atol=0)
    stage = build()
    black = batch_of(2, images=torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert stage.loss(black).total.isfinite()


def test_masks_belong_to_samples_not_to_batches() -> None:
    stage, batch = build(), batch_of(4)
    whole = mask_picture(stage.masking(batch))
    part = batch_of(2, seeds=batch.seeds[2:], images=batch.images[2:])
    assert torch.equal(mask_picture(stage.masking(part)), whole[2:])
    assert (whole.sum(1) == 48).all()
    assert not torch.equal(whole[0], whole[1])


def test_absent_samples_change_neither_loss_nor_gradient() -> None:
    stage, batch = build(), batch_of(4)
    stage.loss(batch_of(4, weight=torch.tensor([1.0, 0, 1, 0]))).total.backward()
    weighted = stage.trunk.patch_embed.proj.weight.grad.clone()
    stage.zero_grad()
    there = torch.tensor([0, 2])
    stage.loss(batch_of(2, seeds=batch.seeds[there], images=batch.images[there])).total.backward()
    torch.testing.assert_close(weighted, stage.trunk.patch_embed.proj.weight.grad, rtol=1e-4, atol=1e-5)


def test_encode_returns_patches_in_image_order() -> None:
    stage, batch = build().eval(), batch_of(2)
    tokens = stage.encode(batch.images)
    assert tokens.patches.shape == (2, 64, 48)
    assert tokens.grid == (8, 8)
    # Encoding all patches by index in any order gives the same tokens, moved accordingly.
    order = torch.randperm(64).expand(2, -1)
    moved = stage.trunk(_pixels(stage, batch), keep=order).patches
    torch.testing.assert_close(moved, tokens.patches.gather(1, order.unsqueeze(-1).expand(-1, -1, 48)))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruct_fills_exactly_the_masked_patches(norm_pix: bool) -> None:
    stage, batch = build(norm_pix=norm_pix).eval(), batch_of(2)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[0, :10] = True
    mask[1, 20:30] = True
    filled = stage.reconstruct(batch.images, mask)
    changed = (patchify(filled.float(), 8) != patchify(batch.images.float(), 8)).any(-1)
    assert torch.equal(changed, mask)
    mask[0, 0] = False
    with pytest.raises(ValueError, match="same number"):
        stage.reconstruct(batch.images, mask)


def test_a_perfect_prediction_reconstructs_the_image() -> None:
    """Un-normalising is the inverse of the target's normalisation, patch order included."""
    stage, batch = build(), batch_of(2)
    pixels, mask = _pixels(stage, batch), mask_picture(stage.masking(batch))
    index = masking_from_mask(mask).masked.unsqueeze(-1).expand(-1, -1, 192)
    stage.predict_patches = lambda *_: normalize_patches(patchify(pixels, 8).gather(1, index))  # type: ignore
    filled = stage.reconstruct(batch.images, mask)
    assert (filled.int() - batch.images.int()).abs().max() <= 1


def test_patchify_round_trip_and_denormalize() -> None:
    stage, batch = build(model=MODEL | {"image_size": (48, 72)}), batch_of(2, (48, 72))
    pixels = _pixels(stage, batch)
    assert torch.equal(unpatchify(patchify(pixels, 8), (6, 9)), pixels)
    assert torch.equal(denormalize(pixels, "imagenet"), batch.images)


def test_pictures_show_what_was_predicted() -> None:
    stage, batch = build().eval(), batch_of(3, weight=torch.tensor([1.0, 0, 1]))
    with torch.no_grad():
        predictions = stage.predict(batch)
    pictures = stage.pictures(batch, predictions)
    assert [p.title for p in pictures] == ["sample 0", "sample 2"]
    (_, original), (_, masked), (_, reconstructed) = pictures[0].panels
    hidden = predictions["mask"][0].view(8, 8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(original, batch.images[0])
    assert (masked[:, hidden] == 128).all()
    assert torch.equal(reconstructed[:, ~hidden], original[:, ~hidden])


@pytest.mark.parametrize("ratio", [0.0, 0.999, 1.0])
def test_a_ratio_that_keeps_or_masks_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="mask_ratio"):
        build(mask_ratio=ratio)


def test_kept_patches_are_rounded_as_the_official_code_does() -> None:
    model = MaeOptions.model_validate({"model": {"size": "Ti", "image_size": 224, "patch_size": 32}}).model
    assert model.num_patches == 49
    assert model.num_kept(0.75) == 12
    assert model.num_kept(0.9) == 4


def _pixels(stage: MaeStage, batch: Batch) -> Tensor:
    return normalize(batch.images, stage.options.pixels)
