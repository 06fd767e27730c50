"""Ways in which other people's code differs quietly; each of these was a bug somewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.models.trunk.block import Mlp
from pipeline.models.trunk.config import Gelu, ModelConfig
from pipeline.models.trunk.vit import ViT
from pipeline.stages.mae import MaeOptions

TINY = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}


class Chosen(nn.Module):
    """Stands where open_clip drops patches at random, and drops all but the ones given."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, 1:].gather(1, self.keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :1], patches], 1)


@pytest.mark.parametrize("gelu", ["erf", "quick"])
def test_clips_image_tower_is_this_trunk(gelu: Gelu) -> None:
    """open_clip's, on the same weights: patches are dropped after positions and before the first norm, the projection
    has no bias, eps is 1e-5, and OpenAI's weights want quick GELU.
    """
    from open_clip.transformer import QuickGELU, VisionTransformer

    options = {"position": "learned", "pre_norm": True, "norm_eps": 1e-5, "gelu": gelu}
    trunk = ViT(validate(ModelConfig, TINY | options, where="test"))
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.2)
    act = QuickGELU if gelu == "quick" else nn.GELU
    theirs = VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=4, output_dim=16, patch_dropout=0.5,
        act_layer=act, output_tokens=True,
    )  # fmt: skip
    state = dict(theirs.state_dict())
    for name, value in trunk.state_dict().items():
        state[_in_open_clip(name)] = value
    state["class_embedding"] = trunk.cls_token[0, 0]
    state["positional_embedding"] = trunk.pos_embed[0]
    theirs.load_state_dict({name: value for name, value in state.items() if name in theirs.state_dict()}, strict=True)
    keep = torch.tensor([[3, 9, 14], [0, 1, 2]])
    theirs.patch_dropout = Chosen(keep)
    theirs.proj = None
    images = torch.randn(2, 3, 32, 32)
    cls, patches = theirs(images)
    tokens = trunk(images, keep=keep)
    torch.testing.assert_close(tokens.prefix[:, 0], cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.patches, patches, rtol=1e-4, atol=1e-5)


def _in_open_clip(name: str) -> str:
    for ours, clip in (
        ("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("blocks.", "transformer.resblocks."), ("norm1", "ln_1"),
        ("norm2", "ln_2"), ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ):  # fmt: skip
        name = name.replace(ours, clip)
    return name.replace("norm.", "ln_post.") if name.startswith("norm.") else name


def test_the_three_gelus_are_three() -> None:
    from transformers.activations import ACT2FN

    torch.manual_seed(0)
    x = torch.randn(1, 5, 8) * 3
    outputs = []
    for gelu, theirs in (("erf", "gelu"), ("tanh", "gelu_pytorch_tanh"), ("quick", "quick_gelu")):
        torch.manual_seed(1)
        mlp = Mlp(8, 16, gelu)
        expected = mlp.fc2(ACT2FN[theirs](mlp.fc1(x)))
        torch.testing.assert_close(mlp(x), expected)
        outputs.append(expected)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-5
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3


def test_every_norm_has_the_eps_asked_for() -> None:
    options = {"norm_eps": 3e-4, "pre_norm": True}
    trunk = ViT(validate(ModelConfig, TINY | options, where="test"))
    norms = [part for part in trunk.modules() if isinstance(part, nn.LayerNorm)]
    assert len(norms) == 6
    assert {norm.eps for norm in norms} == {3e-4}


def test_kept_patches_are_rounded_down_and_none_is_refused() -> None:
    """MAE keeps int(N (1 - r)); masking int(r N) instead would keep 13 of 49 at .75."""
    seven = validate(ModelConfig, TINY | {"image_size": 56}, where="test")
    assert (seven.num_patches, seven.num_kept(0.75)) == (49, 12)
    ten = TINY | {"image_size": (16, 40)}
    assert validate(ModelConfig, ten, where="test").num_kept(0.9) == 0  # 1 - .9 is a little less than .1
    with pytest.raises(ConfigError, match="keeps 0 of 10 patches"):
        validate(MaeOptions, {"model": ten, "mask_ratio": 0.9}, where="test")
