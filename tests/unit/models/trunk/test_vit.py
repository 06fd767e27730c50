"""The trunk: equal to timm's on the same weights, indifferent to which patches it isn't given, reproducible."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.models.trunk.attention import attend, attend_explicitly
from pipeline.models.trunk.config import SIZES, ModelConfig
from pipeline.models.trunk.pooling import AttentionPool, pool
from pipeline.models.trunk.position import interpolate, sincos1d, sincos2d
from pipeline.models.trunk.vit import Tokens, ViT

TINY = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}


def build(**changes: object) -> ViT:
    torch.manual_seed(0)
    return ViT(validate(ModelConfig, TINY | changes, where="test"))


def all_tokens(tokens: Tokens) -> Tensor:
    return torch.cat([tokens.prefix, tokens.patches], dim=1)


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({}, {}),
        ({"cls_token": False}, {"class_token": False}),
        ({"registers": 3}, {"reg_tokens": 3, "no_embed_class": True}),
        ({"gelu": "tanh"}, {"act_layer": "gelu_tanh"}),
        ({"image_size": (16, 40)}, {"img_size": (16, 40)}),
        ({"final_norm": False}, {"final_norm": False}),
        ({"mlp_width": 48}, {"mlp_ratio": 1.5}),
        ({"pre_norm": True}, {"pre_norm": True}),
        ({"layer_scale": 0.1}, {"init_values": 0.1}),
    ],
)
def test_equals_timm_on_the_same_weights(changes: dict[str, object], theirs: dict[str, object]) -> None:
    from timm.models.vision_transformer import VisionTransformer

    trunk = build(position="learned", **changes)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    if not changes.get("cls_token", True):
        options["global_pool"] = "avg"
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    peer = VisionTransformer(**(options | {"final_norm": True, "fc_norm": False, "norm_layer": norm} | theirs))
    state = trunk.state_dict()
    if "registers" in changes:  # timm then has positions for patches alone; cls has its own added once
        trunk.pos_embed.data[:, 0] = 0
        state["pos_embed"] = state["pos_embed"][:, 1:]
    peer.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, *trunk.config.image_hw)
    torch.testing.assert_close(all_tokens(trunk(images)), peer.forward_features(images), rtol=1e-5, atol=1e-6)


def test_kept_patches_are_encoded_as_if_the_others_were_not_there() -> None:
    trunk = build().eval()
    images = torch.randn(2, 3, 32, 32)
    keep = torch.tensor([[3, 9, 14], [0, 1, 2]])
    expected = trunk(images, keep=keep)
    torn = images.clone()
    for i in range(2):
        for patch in set(range(16)) - set(keep[i].tolist()):
            row, column = divmod(patch, 4)
            torn[i, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 1e3
    torch.testing.assert_close(all_tokens(trunk(torn, keep=keep)), all_tokens(expected))
    assert expected.grid == (4, 4)
    moved = trunk(images, keep=keep.flip(1)).patches.flip(1)
    torch.testing.assert_close(moved, expected.patches)


def test_only_the_context_is_attended_to_in_every_block() -> None:
    """timm's trunk with a mask over the keys, on the same weights."""
    from timm.models.vision_transformer import VisionTransformer

    trunk = build(position="learned")
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    peer = VisionTransformer(**options, norm_layer=norm)
    peer.load_state_dict(trunk.state_dict(), strict=True)
    images, context = torch.randn(2, 3, 32, 32), torch.tensor([[3, 9, 14], [0, 1, 2]])
    seen = torch.zeros(2, 17, dtype=torch.bool)
    seen[:, 0] = True
    seen.scatter_(1, context + 1, True)
    expected = peer.forward_features(images, attn_mask=seen.view(2, 1, 1, 17).expand(-1, 2, 17, -1))
    torch.testing.assert_close(all_tokens(trunk(images, context=context)), expected, rtol=1e-5, atol=1e-6)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(trunk(images, context=everything).patches, trunk(images).patches)


def test_a_context_of_kept_patches_is_numbered_as_they_come_out() -> None:
    trunk = build(cls_token=False)
    images, keep = torch.randn(1, 3, 32, 32), torch.tensor([[9, 3, 14]])
    actual = trunk(images, keep=keep, context=torch.tensor([[1]])).patches
    alone = trunk(images, keep=torch.tensor([[3]])).patches
    torch.testing.assert_close(actual[:, 1:2], alone)


def test_without_positions_patches_are_a_set() -> None:
    trunk = build(position="none")
    assert trunk.pos_embed is None
    images = torch.randn(1, 3, 32, 32)
    swapped = torch.cat([images[..., 16:], images[..., :16]], dim=-1)
    actual, moved = (trunk(x).patches.view(4, 4, 32) for x in (images, swapped))
    torch.testing.assert_close(torch.cat([actual[:, 2:], actual[:, :2]], 1), moved)
    assert not torch.allclose(
        build()(images).patches.view(4, 4, 32)[:, 2:], build()(swapped).patches.view(4, 4, 32)[:, :2]
    )


class Counter:
    """Counts the numbers that backward keeps."""

    num = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.num += tensor.numel()
        return tensor


@pytest.mark.parametrize("changes", [{}, {"cls_token": False, "window": 2, "conv_blocks": (0,)}])
def test_activation_checkpointing_changes_memory_alone(changes: dict[str, object]) -> None:
    images, seeds = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    outcomes = []
    for on in (False, True):
        trunk = build(drop_path=0.5, activation_checkpointing=on, **changes).train()
        stored = Counter()
        with torch.autograd.graph.saved_tensors_hooks(stored, lambda t: t):
            loss = trunk(images, seeds=seeds, taps=(0,)).patches.square().sum()
        loss.backward()
        outcomes.append((stored.num, [parameter.grad for parameter in trunk.parameters()]))
    (plain, expected), (less, gradients) = outcomes
    assert less < plain / 2
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_masking_no_patch_equals_no_masking() -> None:
    trunk = build()
    images = torch.randn(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(all_tokens(trunk(images, keep=everything)), all_tokens(trunk(images)))


def test_taps_are_the_blocks_outputs_before_the_norm() -> None:
    trunk = build()
    tokens = trunk(torch.randn(2, 3, 32, 32), taps=(1, 0))
    last, first = tokens.taps
    torch.testing.assert_close(trunk.norm(last), all_tokens(tokens))
    torch.testing.assert_close(trunk.blocks[1](first), last)


def test_drop_path_is_the_samples_own_and_right_on_average() -> None:
    trunk = build(drop_path=0.5, depth=2).train()
    images = torch.randn(1, 3, 32, 32).expand(512, -1, -1, -1)
    seeds = torch.arange(512)
    outputs = all_tokens(trunk(images, seeds=seeds))
    again = all_tokens(trunk(images[:4], seeds=seeds[[7, 3, 7, 0]]))
    torch.testing.assert_close(again, outputs[[7, 3, 7, 0]])
    scales = trunk._branch_scales(seeds)
    assert scales is not None
    assert (scales[:, 0] == 1).all(), "the first block is never dropped"
    assert set(scales[:, 1].unique().tolist()) == {0.0, 2.0}
    assert abs(scales[:, 1].mean().item() - 1) < 0.1
    with pytest.raises(ValueError, match="seeds"):
        trunk(images)
    torch.testing.assert_close(trunk.eval()(images[:1]).patches, build(depth=2)(images[:1]).patches)


@pytest.mark.parametrize("how", ["bicubic", "bicubic_antialias", "bilinear"])
def test_other_image_sizes_interpolate_the_native_table(how: str) -> None:
    trunk = build(interpolation=how)
    other = trunk(torch.randn(1, 3, 48, 24))
    assert other.grid == (6, 3)
    assert other.patches.shape == (1, 18, 32)
    table = sincos2d((4, 4), 32)
    assert interpolate(table, (4, 4), (4, 4), how) is table
    wider = interpolate(table, (4, 4), (4, 8), how).view(4, 8, 32)
    assert not torch.allclose(wider[:, 0], wider[:, 1])  # x is resampled
    torch.testing.assert_close(wider[0, :, :16], wider[2, :, :16])  # and stays the same in every row


def test_interpolations_are_timms_and_the_official_maes() -> None:
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(36, 8)
    theirs = resample_abs_pos_embed(table.unsqueeze(0), [4, 4], [6, 6], num_prefix_tokens=0)[0]
    torch.testing.assert_close(interpolate(table, (6, 6), (4, 4), "bicubic_antialias"), theirs)
    plain = interpolate(table, (6, 6), (4, 4), "bicubic")
    image = table.view(1, 6, 6, 8).permute(0, 3, 1, 2)
    official = torch.nn.functional.interpolate(image, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(plain, official.permute(0, 2, 3, 1).reshape(16, 8))
    assert not torch.allclose(plain, theirs)


def test_sincos_conventions() -> None:
    """x comes first; MAE divides the exponent by D/4, big_vision by D/4 - 1."""
    table = sincos2d((2, 3), 16)
    by_place = table.view(2, 3, 4, 4)
    torch.testing.assert_close(by_place[1, 2, 0], torch.sin(2 / 10000 ** (torch.arange(4) / 4)))
    torch.testing.assert_close(by_place[1, 2, 3], torch.cos(1 / 10000 ** (torch.arange(4) / 4)))
    theirs = sincos2d((2, 3), 16, "sincos2d_bigvision").view(2, 3, 4, 4)
    torch.testing.assert_close(theirs[1, 2, 0], torch.sin(2 / 10000 ** (torch.arange(4) / 3)))


def test_sincos1d_counts_patches_in_reading_order() -> None:
    table = sincos1d(12, 16)
    torch.testing.assert_close(table[7, :8], torch.sin(7 / 10000 ** (torch.arange(8) / 8)))
    torch.testing.assert_close(table[7, 8:], torch.cos(7 / 10000 ** (torch.arange(8) / 8)))
    trunk = build(position="sincos1d", width=8, image_size=(16, 24))
    torch.testing.assert_close(trunk.fixed((2, 3), torch.empty(0)), sincos1d(6, 8))


def test_a_position_table_may_have_another_grid_than_the_images() -> None:
    trunk = build(position="learned", position_image_size=(16, 24))
    assert trunk.pos_embed is not None
    assert trunk.pos_embed.shape == (1, 7, 32)
    smaller = build(position="learned", image_size=(16, 24))
    smaller.load_state_dict(trunk.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(trunk(images).patches, smaller(images).patches)


def test_a_trained_sincos_table_starts_where_the_fixed_one_stands() -> None:
    images = torch.randn(1, 3, 32, 32)
    fixed, trained = build(), build(position_trained=True)
    assert fixed.pos_embed is None
    assert trained.pos_embed is not None
    torch.testing.assert_close(all_tokens(fixed(images)), all_tokens(trained(images)))


def test_layers_for_layerwise_decay_are_the_official_ones() -> None:
    trunk = build(position="learned", registers=1)
    layers = {name: trunk.layer_of(name) for name, _ in trunk.named_parameters()}
    assert {layers[n] for n in ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert layers["blocks.0.attn.qkv.bias"] == 1
    assert layers["blocks.1.norm2.weight"] == 2
    assert layers["norm.weight"] == trunk.num_layers == 3


def test_weights_are_the_same_for_the_same_seed() -> None:
    first, second = build().state_dict(), build().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_ways_of_attention_agree(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 17, 16, dtype=torch.float64).to(dtype) for _ in range(3))
    exact = attend_explicitly(q.double(), k.double(), v.double())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for attention in (attend, attend_explicitly, torch.nn.functional.scaled_dot_product_attention):
        torch.testing.assert_close(attention(q, k, v).double(), exact, atol=tolerance, rtol=tolerance)


def test_pooling() -> None:
    tokens = Tokens(torch.arange(6.0).view(1, 3, 2), torch.tensor([[[9.0, 9.0], [5.0, 5.0]]]), (1, 3))
    assert pool(tokens, "cls").tolist() == [[9.0, 9.0]]
    assert pool(tokens, "avg").tolist() == [[2.0, 3.0]]
    torch.testing.assert_close(pool(tokens, "avg_with_cls"), torch.tensor([[20 / 5, 23 / 5]]))


def test_attention_pooling_is_timms() -> None:
    from timm.layers.attention_pool import AttentionPoolLatent

    ours = AttentionPool(validate(ModelConfig, TINY, where="test"))
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    theirs = AttentionPoolLatent(32, num_heads=2, norm_layer=norm)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 17, 32)
    actual = ours(Tokens(x[:, 1:], x[:, :1], (4, 4)))
    torch.testing.assert_close(actual, theirs(x), rtol=1e-5, atol=1e-6)


def test_sizes_have_the_parameters_the_papers_name() -> None:
    """Millions of parameters of the blocks: 12 D^2 each at mlp ratio 4, more or less."""
    million = {"Ti": 5.3, "S": 21.3, "B": 85, "L": 302, "H": 630, "g": 1010, "G": 1840}
    for name, expected in million.items():
        width, depth, mlp_width, _ = SIZES[name]
        count = depth * (4 * width**2 + 2 * width * mlp_width)
        assert abs(count / 1e6 / expected - 1) < 0.02, name


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"size": "XL"}, "no model size 'XL'"),
        ({"width": 32}, "give a size"),
        (TINY | {"heads": 3}, "heads"),
        (TINY | {"image_size": 30}, "multiple of patch_size"),
        (TINY | {"image_size": (32, 36)}, "multiple of patch_size"),
        (TINY | {"widht": 3}, "unknown key 'widht'"),
        ({"width": 30, "depth": 1, "heads": 2}, "divisible by 4"),
        (TINY | {"position_image_size": 20}, "position_image_size 20x20 isn't a multiple"),
        (TINY | {"position": "none", "position_trained": True}, "position_trained"),
    ],
)
def test_impossible_models_are_refused(document: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ModelConfig, document, where="test")


def test_overrides_keep_the_rest_of_the_size() -> None:
    assert ModelConfig(size="So400m", depth=2).shape == (1152, 2, 4304, 16)
    assert ModelConfig(size="B", width=384).shape == (384, 12, 1536, 12)


def test_a_trunk_that_was_exported_works_as_before() -> None:
    """A table evaluated while a graph is traced is a stand-in, which must not stay behind."""
    trunk = build(image_size=32, position_image_size=16).eval()
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.export(_Patches(trunk), (images,))
    actual = trunk(images).patches
    assert type(actual) is torch.Tensor
    torch.testing.assert_close(program.module()(images), actual)


class _Patches(torch.nn.Module):
    def __init__(self, trunk: ViT) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.trunk(images).patches
