"""Ways from images to patch vectors, against torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.models.batch_norm import BatchNorm
from pipeline.models.pixels import patchify
from pipeline.models.trunk.config import SIZES, STEMS, ModelConfig
from pipeline.models.trunk.patch_embed import ConvStem, NormedPatchEmbed
from pipeline.models.trunk.vit import ViT

TINY = {"width": 32, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8}


def config(**changes: object) -> ModelConfig:
    return validate(ModelConfig, TINY | changes, where="test")


def test_norm_linear_is_norm_linear_norm_over_flattened_patches() -> None:
    embed = NormedPatchEmbed(32, 8, 1e-5)
    for norm in (embed.norm_in, embed.norm_out):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    theirs = nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 32), nn.LayerNorm(32))
    theirs.load_state_dict(dict(zip(theirs.state_dict(), embed.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 32, 16)
    torch.testing.assert_close(embed(images), theirs(patchify(images, 8)))
    keep = torch.tensor([[5, 0], [1, 7]])
    torch.testing.assert_close(embed(images, keep)[1, 1], embed(images)[1, 7])


@pytest.mark.parametrize("training", [True, False])
def test_the_stem_is_convolutions_batch_norms_and_relus(training: bool) -> None:
    """Strides included: 2 where channels change, 1 where they stay (pycls's C_STEM_STRIDES of 18GF)."""
    channels = (4, 8, 8, 16)
    stem = ConvStem(32, channels).train(training)
    layers: list[nn.Module] = []
    for before, after, stride in zip((3, *channels), channels, (2, 2, 1, 2), strict=False):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    theirs = nn.Sequential(*layers, nn.Conv2d(16, 32, 1)).train(training)
    for ours, norm in zip(stem.norms, [part for part in theirs if isinstance(part, nn.BatchNorm2d)], strict=True):
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(ours, name).data.uniform_(0.5, 2)
            getattr(norm, name).data.copy_(getattr(ours, name))
    for ours, conv in zip([*stem.convs, stem.proj], [p for p in theirs if isinstance(p, nn.Conv2d)], strict=True):
        conv.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 32, 48)
    embedded = stem(images)
    torch.testing.assert_close(embedded, theirs(images).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stem.norms[1].running_var, theirs[4].running_var)
    torch.testing.assert_close(stem.norms[1].running_mean, theirs[4].running_mean)


def test_kept_patches_are_chosen_after_the_stem() -> None:
    trunk = ViT(config(patch_embed="conv_stem", depth=1)).eval()
    images, keep = torch.randn(2, 3, 32, 32), torch.tensor([[3, 9], [0, 15]])
    some_patches, whole = trunk.patch_embed(images, keep), trunk.patch_embed(images)
    torch.testing.assert_close(some_patches[0], whole[0, [3, 9]])
    neighbour = images.clone()
    neighbour[:, :, :8, 16:24] = 5  # patch 2, beside patch 3
    assert not torch.allclose(trunk.patch_embed(neighbour, keep)[0, 0], some_patches[0, 0])


def test_batch_norms_averages_stay_in_fp32() -> None:
    norm = BatchNorm(4).bfloat16()
    assert norm.running_mean.dtype == torch.float32
    assert norm.weight.dtype == torch.bfloat16
    assert norm(torch.randn(2, 4, 3, 3).bfloat16()).dtype == torch.bfloat16
    assert BatchNorm(4).double().running_mean.dtype == torch.float64
    for _ in range(200):  # in bf16 the average would stick a few steps of rounding before its goal
        norm(torch.full((2, 4, 3, 3), 1.0).bfloat16())
    torch.testing.assert_close(norm.running_mean, torch.ones(4), rtol=1e-5, atol=0)


def test_named_stems_fit_their_sizes() -> None:
    """Gigaflops at 224 pixels, multiplications counted once, as the sizes are named."""
    for size, channels in STEMS.items():
        model = ModelConfig(size=size, patch_embed="conv_stem", patch_size=16)
        assert model.stem == channels
        width, depth, mlp_width, _ = SIZES[size]
        side, before, flops = 224, 3, 0
        for after in channels:
            side //= 1 if after == before else 2
            flops += 9 * before * after * side**2
            before = after
        assert side == 14
        flops += before * width * 196
        flops += depth * (197 * (4 * width**2 + 2 * width * mlp_width) + 2 * 197**2 * width)
        assert flops / 1e9 == pytest.approx(int(size[2:-2]), rel=0.15), size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem_channels": (8, 16, 32)}, "patch_embed: conv_stem"),
        ({"patch_embed": "conv_stem", "stem_channels": (8, 16)}, "stride 4, not patch_size 8"),
        ({"patch_embed": "conv_stem", "patch_size": 1}, "no default stem"),
        ({"patch_embed": "conv_stem", "patch_size": 16, "width": 4}, "no default stem"),
        ({"patch_embed": "conv_stem", "pre_norm": True}, "pre_norm"),
        ({"patch_embed": "conv"}, "patch_embed"),
    ],
)
def test_impossible_embeddings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
