"""Stage `mae`: other masks, sampled ratios, and CrossMAE's decoder with partial prediction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import validate
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError
from pipeline.losses.reconstruction import masked_mse, normalize_patches
from pipeline.models.pixels import normalize, patchify
from pipeline.models.trunk.masking import mask_picture, take
from pipeline.models.trunk.position import sincos2d
from pipeline.stages.base import DataFacts
from pipeline.stages.mae import MaeOptions, MaeStage

MODEL = {"width": 48, "depth": 3, "heads": 4, "image_size": 64, "patch_size": 8}
CROSS = {"attention": "cross", "width": 32, "depth": 2, "heads": 4}


def build(**changes: object) -> MaeStage:
    torch.manual_seed(0)
    document = {"model": MODEL, "decoder": {"width": 32, "depth": 2, "heads": 4}} | changes
    return MaeStage(validate(MaeOptions, document, where="test"), DataFacts())


def batch_of(num: int = 4, **changes: object) -> Batch:
    images = torch.randint(0, 256, (num, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    fields = {"ids": torch.arange(num), "seeds": torch.arange(num) + 100, "weight": torch.ones(num)}
    return Batch(**(fields | {"position": 0, "images": images} | changes))


@pytest.mark.parametrize("changes", [{"masking": "block", "mask_ratio": 0.5}, {"masking": "grid"}])
def test_other_masks_train_and_reconstruct(changes: dict[str, object]) -> None:
    stage, batch = build(**changes), batch_of()
    stage.loss(batch).total.backward()
    predictions = stage.eval().predict(batch)
    assert predictions["mask"].sum(1).tolist() == [64 * changes.get("mask_ratio", 0.75)] * 4
    assert torch.equal(predictions["mask"], mask_picture(stage.masking(batch)))


def test_a_sampled_ratio_is_the_steps_own_and_equal_on_all_ranks() -> None:
    stage = build(mask_ratio=[0.5, 0.9]).train()
    counts = [stage.masking(batch_of(2, position=64 * step)).keep.shape[1] for step in range(300)]
    assert (min(counts), max(counts)) == (6, 31)
    assert abs(sum(counts) / 300 - 64 * 0.3) < 1
    other_rank = batch_of(3, position=64 * 7, seeds=torch.tensor([5, 6, 7]))
    assert stage.masking(other_rank).keep.shape[1] == counts[7]
    stage.loss(batch_of(2, position=64)).total.backward()


def test_evaluation_takes_the_middle_ratio() -> None:
    stage = build(mask_ratio=[0.5, 0.9]).eval()
    assert {stage.masking(batch_of(2, position=64 * step)).keep.shape[1] for step in range(20)} == {19}


def parts(stage: MaeStage, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, tokens of the kept patches with cls, and the mask tokens at their places."""
    pixels, masking = normalize(batch.images, "imagenet"), stage.masking(batch)
    tokens = stage.trunk(pixels, keep=masking.keep)
    places = take(sincos2d((8, 8), 32).expand(len(batch), -1, -1), masking.masked)
    return pixels, torch.cat([tokens.prefix, tokens.patches], 1), stage.decoder.mask_token + places


def through(stage: MaeStage, x: Tensor, sources: list[Tensor]) -> Tensor:
    """The cross-attention decoder in torch's own parts."""
    decoder = stage.decoder
    for block, source in zip(decoder.decoder_blocks, sources, strict=True):
        attention = nn.MultiheadAttention(32, 4, kdim=48, vdim=48, batch_first=True)
        k, v = block.cross_attn.kv.weight.chunk(2)
        attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight = (
            nn.Parameter(w) for w in (block.cross_attn.q.weight, k, v)
        )
        attention.in_proj_bias.data = torch.cat([block.cross_attn.q.bias, block.cross_attn.kv.bias]).detach()
        attention.out_proj = block.cross_attn.proj
        x = x + attention(block.norm1(x), source, source, need_weights=False)[0]
        x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
    return decoder.decoder_pred(decoder.decoder_norm(x))


def perturb(stage: MaeStage) -> None:
    """Zero biases would hide where they are added."""
    with torch.no_grad():
        for parameter in stage.decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def test_the_cross_decoder_is_torchs_attention_from_mask_tokens_to_kept_ones() -> None:
    stage, batch = build(decoder=CROSS), batch_of()
    perturb(stage)
    pixels, source, x = parts(stage, batch)
    expected = through(stage, x, [source, source])
    torch.testing.assert_close(stage.predict_patches(pixels, stage.masking(batch)), expected, rtol=1e-4, atol=1e-5)


def test_feature_maps_are_mixed_for_each_decoder_block() -> None:
    stage, batch = build(decoder=CROSS | {"feature_maps": True}), batch_of()
    perturb(stage)
    assert stage.trunk.norm is None
    pixels, _, x = parts(stage, batch)
    masking = stage.masking(batch)
    maps = stage.trunk(pixels, keep=masking.keep, taps=(-1, 0, 1, 2)).taps
    torch.testing.assert_close(stage.trunk.blocks[0](maps[0]), maps[1])
    weights = stage.decoder.wfm.linear.weight
    assert weights.shape == (2, 4)
    mixed = [sum(w * m for w, m in zip(row, maps, strict=True)) for row in weights]
    sources = [norm(m) for norm, m in zip(stage.decoder.dec_norms, mixed, strict=True)]
    expected = through(stage, x, sources)
    torch.testing.assert_close(stage.predict_patches(pixels, masking), expected, rtol=1e-4, atol=1e-5)
    stage.loss(batch).total.backward()
    assert [n for n, p in stage.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_partial_prediction_is_a_part_of_the_full_one() -> None:
    whole, part = build(decoder=CROSS), build(decoder=CROSS, predict_ratio=0.25)
    batch = batch_of()
    pixels, masking = normalize(batch.images, "imagenet"), whole.masking(batch)
    prediction = whole.predict_patches(pixels, masking)[:, -16:]
    target = take(patchify(pixels, 8), masking.masked)[:, -16:]
    expected = masked_mse(prediction, normalize_patches(target)).sum()
    torch.testing.assert_close(part.loss(batch).total, expected)
    assert part.loss(batch).total != whole.loss(batch).total
    torch.testing.assert_close(part.predict(batch)["reconstruction_mse"], whole.predict(batch)["reconstruction_mse"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": [0.9, 0.5]}, "low to high"),
        ({"mask_ratio": [0.5, 0.999]}, "keeps 0 of 64"),
        ({"mask_ratio": [0.0, 0.5]}, "mask_ratio"),
        ({"masking": "grid", "mask_ratio": 0.6}, "one patch of every square cell"),
        ({"masking": "grid", "mask_ratio": 0.889}, "fit the grid of 8x8"),
        ({"masking": "grid", "mask_ratio": [0.7, 0.75]}, "square cell"),
        ({"predict_ratio": 0.25}, "decoder.attention: cross"),
        ({"decoder": CROSS, "predict_ratio": 0.8}, "no more than are masked"),
        ({"decoder": CROSS, "predict_ratio": 0.001}, "must predict a patch"),
        ({"decoder": {"feature_maps": True}}, "attention: cross"),
        ({"model": MODEL | {"cls_token": False, "window": 2}}, "whole images"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)
