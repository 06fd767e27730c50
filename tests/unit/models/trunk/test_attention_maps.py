"""Attention weights against other people's models, and what is made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline import convert
from pipeline.config import validate
from pipeline.models.trunk.attention_maps import attention_map, attention_weights, rollout
from pipeline.models.trunk.config import ModelConfig
from pipeline.models.trunk.vit import ViT
from pipeline.pictures.attention import heat_map
from tests.support.convert_peers import shaken

TINY = {"width": 32, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8}


def trunk_of(**options: object) -> ViT:
    torch.manual_seed(0)
    trunk = ViT(validate(ModelConfig, TINY | options, where="test"))
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return trunk.eval()


def images(size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def test_weights_are_hugging_faces(tmp_path: object) -> None:
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    config = ViTConfig(**shape, image_size=32, patch_size=8, attn_implementation="eager")
    theirs = shaken(ViTModel(config, add_pooling_layer=False))
    theirs.save_pretrained(str(tmp_path))
    ours = convert.load(str(tmp_path), "hf_vit")
    expected = theirs(images(), output_attentions=True).attentions
    actual = attention_weights(ours.trunk, images(), (0, 1, -1))
    for ours_weights, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours_weights, other, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours_weights.sum(-1), torch.ones(ours_weights.shape[:-1]))


@pytest.mark.parametrize("kind", [True, "shared"])
def test_relative_positions_count(kind: object) -> None:
    """What `weights` tells is what the forward pass uses: applied to the values it gives the output."""
    trunk = trunk_of(cls_token=False, relative_positions=kind, window=2, global_blocks=(1,))
    (weights,) = attention_weights(trunk, images(), (1,))
    attention, seen = trunk.blocks[1].attn, []
    attention.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    trunk(images())
    inputs, out = seen[0]
    values = attention.qkv(inputs).view(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)[2]
    applied = attention.proj((weights @ values).transpose(1, 2).reshape(2, 4, 4, 32))
    torch.testing.assert_close(applied, out, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"within windows; the global ones are \[1\]"):
        attention_weights(trunk, images(), (0,))


def test_a_cls_token_looks_at_patches_and_without_one_all_patches_do() -> None:
    size = (16, 40)
    trunk = trunk_of(image_size=size, registers=2)
    (weights,) = attention_weights(trunk, images(size), (0,))
    actual = attention_map(trunk, weights, (2, 5))
    assert actual.from_cls
    assert torch.equal(actual.heads.flatten(2), weights[:, :, 0, 3:])
    bare = trunk_of(image_size=size, cls_token=False)
    (weights,) = attention_weights(bare, images(size), (0,))
    assert torch.equal(attention_map(bare, weights, (2, 5)).heads.flatten(2), weights.mean(2))


def test_rollout_follows_attention_through_the_blocks() -> None:
    """Of two blocks: half stays, half goes where attention points; rows keep summing to 1."""
    swap = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    first = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    actual = rollout((first, swap))
    halves = torch.tensor([[0.5, 0.5], [0.5, 0.5]]) @ torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(actual[0], halves)


def test_heat_is_brightest_where_the_weight_is() -> None:
    weights = torch.zeros(4, 4)
    weights[1, 2] = 1
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    bright = heat_map(image, weights).float().sum(0)
    hot = torch.zeros(32, 32, dtype=torch.bool)
    hot[8:16, 16:24] = True
    assert bright[hot].min() > bright[~hot].max()
