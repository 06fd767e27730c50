"""Windows, relative positions and convolutions: detectron2's recorded numbers, Hugging Face's, and the traps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.models.trunk.config import ModelConfig
from pipeline.models.trunk.vit import ViT
from pipeline.models.trunk.windows import SharedPositions, SpatialAttention, join, partition, relative_table

TINY = {"width": 48, "depth": 4, "heads": 3, "patch_size": 16, "cls_token": False, "final_norm": False}


def build(**changes: object) -> ViT:
    torch.manual_seed(0)
    trunk = ViT(validate(ModelConfig, TINY | {"image_size": 128} | changes, where="test"))
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():  # zeros at the start would hide what they multiply
            if "rel_pos" in name or "norm3" in name:
                parameter.normal_(std=0.3)
    return trunk


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny", {"window": 3, "global_blocks": (1, 3), "position_image_size": 64}),
        ("tiny_conv", {"depth": 3, "window": 4, "conv_blocks": (1,)}),
    ],
)
def test_equals_detectron2(name: str, options: dict[str, object], shared: Path) -> None:
    path = shared / "reference" / "fixtures" / f"vitdet_official_{name}.npz"
    if not path.exists():
        pytest.skip(f"no recorded outputs at {path}")
    recorded = {key: torch.from_numpy(value) for key, value in np.load(path).items() if value.size}
    net = "sd.backbone.net."
    state = {key.removeprefix(net): value for key, value in recorded.items() if key.startswith(net)}
    state["pos_embed"] = state["pos_embed"][:, 1:]  # cls takes no part
    trunk = build(position="learned", relative_positions=True, **options)
    trunk.load_state_dict(state, strict=True)
    ours = trunk(recorded["images"]).patches.transpose(1, 2).unflatten(2, (8, 8))
    assert (ours - recorded["last_feat"]).abs().max() <= 1e-5 * recorded["last_feat"].abs().max()


@pytest.mark.parametrize("conv_blocks", [(), (0, 2)])
def test_equals_hugging_face_in_float64_with_gradients(conv_blocks: tuple[int, ...]) -> None:
    from transformers import VitDetBackbone, VitDetConfig

    options = {"window": 3, "global_blocks": (1, 3), "conv_blocks": conv_blocks, "relative_positions": True}
    ours = build(position="learned", image_size=80, **options).double()
    theirs = VitDetBackbone(
        VitDetConfig(
            hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=80, pretrain_image_size=80,
            patch_size=16, window_block_indices=[0, 2], residual_block_indices=list(conv_blocks), window_size=3,
            use_relative_position_embeddings=True, use_absolute_position_embeddings=True, layer_norm_eps=1e-6,
            drop_path_rate=0.0, out_indices=[4],
        )
    ).double()  # fmt: skip
    theirs.load_state_dict(_as_hugging_face(ours), strict=True)
    images = torch.randn(2, 3, 80, 80, dtype=torch.float64)
    actual, expected = ours(images).patches, theirs(images).feature_maps[-1].flatten(2).transpose(1, 2)
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()
    actual.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in _as_hugging_face(ours, gradients=True).items():
        if name != "embeddings.position_embeddings":
            assert (gradient - gradients[name]).abs().max() <= 1e-9 * gradients[name].abs().max(), name


def _as_hugging_face(trunk: ViT, *, gradients: bool = False) -> dict[str, Tensor]:
    actual = {name: p.grad if gradients else p.detach() for name, p in trunk.named_parameters()}
    table = actual.pop("pos_embed")
    renamed = {"embeddings.position_embeddings": torch.cat([torch.zeros_like(table[:, :1]), table], 1)}
    for name, value in actual.items():
        name = name.replace("patch_embed.proj", "embeddings.projection").replace("blocks.", "encoder.layer.")
        renamed[name.replace("attn.", "attention.")] = value
    return renamed


def test_a_window_as_large_as_the_grid_is_global_attention() -> None:
    images = torch.randn(1, 3, 128, 128)
    options = {"relative_positions": False, "position": "sincos2d"}
    whole, windowed, plain = build(window=8, **options), build(window=9, **options), build(**options)
    for trunk in (windowed, plain):
        trunk.load_state_dict(whole.state_dict())
    torch.testing.assert_close(whole(images).patches, plain(images).patches, rtol=1e-5, atol=1e-5)
    # One row and column of zeros after the norm take part in attention, as they did when official weights were made.
    assert (windowed(images).patches - plain(images).patches).abs().max() > 1e-3


def test_padding_is_zeros_after_the_norm_and_attended_to() -> None:
    trunk = build(window=3, depth=1, position="none").double()
    block = trunk.blocks[0]
    torch.nn.init.normal_(block.norm1.bias)  # so that padding before the norm would show
    x = torch.randn(1, 4, 48, dtype=torch.float64)
    normed = torch.zeros(1, 3, 3, 48, dtype=torch.float64)
    normed[:, :2, :2] = block.norm1(x).view(1, 2, 2, 48)
    qkv = block.attn.qkv(normed.view(1, 9, 48)).view(1, 9, 3, 3, 16).permute(2, 0, 3, 1, 4)
    attended = torch.nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(1, 3, 3, 48)
    expected = x + block.attn.proj(attended)[:, :2, :2].reshape(1, 4, 48)
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x, None, (2, 2)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (2, 10)])
def test_windows_come_back_in_place(grid: tuple[int, int]) -> None:
    x = torch.randn(2, *grid, 4)
    windows = partition(x, 3)
    assert windows.shape[0] == 2 * -(-grid[0] // 3) * -(-grid[1] // 3)
    torch.testing.assert_close(windows[0, :2, :2], x[0, :2, :2])
    assert torch.equal(join(windows, grid), x)


@pytest.mark.parametrize("length", [9, 5, 27])
def test_relative_tables_are_hugging_faces(length: int) -> None:
    from transformers.models.vitdet.modeling_vitdet import get_rel_pos

    table = torch.randn(length, 4)
    torch.testing.assert_close(relative_table(table, 5), get_rel_pos(5, 5, table))


@pytest.mark.parametrize("side", [5, 8])
def test_shared_relative_positions_are_beits(side: int) -> None:
    """Hugging Face's, without the cls token's row and column, on the native grid and on a larger one."""
    from transformers import BeitConfig
    from transformers.models.beit.modeling_beit import BeitRelativePositionBias

    theirs = BeitRelativePositionBias(BeitConfig(image_size=80, patch_size=16, num_attention_heads=3))
    ours = SharedPositions((5, 5), 3)
    with torch.no_grad():
        theirs.relative_position_bias_table.normal_()
        ours.table.copy_(theirs.relative_position_bias_table[:-3])
    expected = theirs((side, side))[0, :, 1:, 1:]
    torch.testing.assert_close(ours((side, side)), expected, rtol=1e-6, atol=1e-6)


def test_blocks_share_relative_positions_within_windows_and_over_the_image() -> None:
    """Each attention is torch's own with that bias; a block's output and gradients are the same when recomputed."""
    options = {"window": 3, "global_blocks": (1, 3), "position": "none", "relative_positions": "shared"}
    trunk = build(**options)
    tables = {name: p.shape for name, p in trunk.named_parameters() if "rel_pos" in name}
    assert tables == {"rel_pos_windows.table": (25, 3), "rel_pos_global.table": (225, 3)}
    images = torch.randn(2, 3, 128, 128)
    placed = torch.randn(2, 8, 8, 48)
    assert trunk.rel_pos_global is not None
    bias, attention = trunk.rel_pos_global((8, 8)), trunk.blocks[1].attn
    q, k, v = attention.qkv(placed.view(2, 64, 48)).view(2, 64, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(2, -1, -1, -1))
    expected = attention.proj(attended.transpose(1, 2).reshape(2, 8, 8, 48))
    torch.testing.assert_close(attention(placed, bias), expected, rtol=1e-4, atol=1e-5)
    again = build(**options, activation_checkpointing=True).train()
    for each_trunk in (trunk.train(), again):
        each_trunk(images).patches.square().sum().backward()
    for (name, ours), theirs in zip(trunk.named_parameters(), again.parameters(), strict=True):
        assert ours.grad is not None, name
        assert ours.grad.any(), name
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_convolutions_start_as_the_identity_and_relative_positions_as_none() -> None:
    torch.manual_seed(0)
    options = TINY | {"image_size": 64, "window": 2, "conv_blocks": (1,), "relative_positions": True}
    trunk = ViT(validate(ModelConfig, options, where="test"))
    images = torch.randn(1, 3, 64, 64)
    before = trunk(images).patches
    trunk.blocks[1].residual = None
    assert torch.equal(trunk(images).patches, before)
    assert not trunk.blocks[0].attn.rel_pos_h.any()


def test_convolutions_keep_the_full_learning_rate_under_layerwise_decay() -> None:
    trunk = build(conv_blocks=(1,), relative_positions=True)
    assert trunk.layer_of("blocks.1.residual.conv1.weight") == trunk.num_layers == 5
    assert trunk.layer_of("blocks.1.attn.rel_pos_h") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 3, "cls_token": True}, "need cls_token false"),
        ({"relative_positions": True, "registers": 2}, "no registers"),
        ({"global_blocks": (1,)}, "needs window"),
        ({"window": 3, "global_blocks": (4,)}, "blocks 0 to 3"),
        ({"conv_blocks": (-1,)}, "blocks 0 to 3"),
    ],
)
def test_impossible_layouts_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_a_part_of_an_image_has_no_windows() -> None:
    with pytest.raises(ValueError, match="whole images"):
        build(window=4)(torch.randn(1, 3, 128, 128), keep=torch.tensor([[0, 1]]))


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(leaf.numel() for leaf in made)])
        return out


def test_relative_positions_need_no_table_of_all_pairs() -> None:
    """Neither forward nor backward makes a tensor of tokens x tokens; materialised biases would be several."""
    torch.manual_seed(0)
    rows, columns = 40, 36
    attention = SpatialAttention(16, 1, (rows, columns))
    x = torch.randn(1, rows, columns, 16, requires_grad=True)
    with LargestTensor() as watched:
        attention(x).square().sum().backward()
    assert watched.largest < (rows * columns) ** 2 / 8


def test_folded_relative_positions_in_bf16_stay_near_fp32() -> None:
    torch.manual_seed(0)
    attention = SpatialAttention(32, 2, (7, 5))
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(table, std=0.5)
    x = torch.randn(2, 7, 5, 32)
    expected = attention(x)
    actual = attention.bfloat16()(x.bfloat16())
    assert (actual - expected).abs().max() <= 0.03 * expected.abs().max()  # bf16 keeps 8 bits: 0.4% of each product
