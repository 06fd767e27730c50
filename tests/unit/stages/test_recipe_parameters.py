"""What every parameter of every recipe gets: its share of the learning rate, its weight decay, and LARS's rescaling.

The tables are written down from the official code, in our names, for trunks of two blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load, validate
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts, Stage
from pipeline.train.config import OptimConfig, TrainConfig
from pipeline.train.optim import build_optimizer, parameter_groups

ROOT = Path(__file__).parents[3]
TINY = {"size": None, "width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}
Table = dict[str, tuple[float, float]]  # parameter -> (share of the rate, weight decay)

MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
VECTORS = (
    "norm1.weight", "norm1.bias", "attn.qkv.bias", "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.bias",
    "mlp.fc2.bias",
)  # fmt: skip


def block(name: str, scale: float, decay: float) -> Table:
    return {f"{name}.{m}": (scale, decay) for m in MATRICES} | {f"{name}.{v}": (scale, 0.0) for v in VECTORS}


def linear(name: str, scale: float, decay: float) -> Table:
    return {f"{name}.weight": (scale, decay), f"{name}.bias": (scale, 0.0)}


def vectors(name: str, scale: float = 1.0) -> Table:
    return {f"{name}.weight": (scale, 0.0), f"{name}.bias": (scale, 0.0)}


# main_pretrain.py: timm's groups on the whole model, so cls and mask tokens are decayed.
MAE_PRETRAIN: Table = {
    "trunk.cls_token": (1.0, 0.05),
    **linear("trunk.patch_embed.proj", 1.0, 0.05),
    **block("trunk.blocks.0", 1.0, 0.05),
    **block("trunk.blocks.1", 1.0, 0.05),
    **vectors("trunk.norm"),
    "decoder.mask_token": (1.0, 0.05),
    **linear("decoder.decoder_embed", 1.0, 0.05),
    **block("decoder.decoder_blocks.0", 1.0, 0.05),
    **vectors("decoder.decoder_norm"),
    **linear("decoder.decoder_pred", 1.0, 0.05),
}
# lr_decay.py with no_weight_decay_list = {pos_embed, cls_token}: layers 0, 1, 2, and 3 for what follows the blocks.
D = 0.65
MAE_FINETUNE: Table = {
    "trunk.cls_token": (D**3, 0.0),
    "trunk.pos_embed": (D**3, 0.0),
    **linear("trunk.patch_embed.proj", D**3, 0.05),
    **block("trunk.blocks.0", D**2, 0.05),
    **block("trunk.blocks.1", D, 0.05),
    **vectors("fc_norm"),
    **linear("head", 1.0, 0.05),
}
# main_linprobe.py: LARS over the head alone.
MAE_PROBE: Table = linear("heads.0", 1.0, 0.0)
# big_vision: `.*/kernel$` alone is decayed; the position table isn't trained.
SIMPLE_VIT: Table = {
    **linear("trunk.patch_embed.proj", 1.0, 0.1),
    **block("trunk.blocks.0", 1.0, 0.1),
    **block("trunk.blocks.1", 1.0, 0.1),
    **vectors("trunk.norm"),
    **linear("pre_logits", 1.0, 0.1),
    **linear("head", 1.0, 0.1),
}
# pycls: no decay for batch norms, layer norms and biases; tokens are neither.
VIT_C: Table = {
    "trunk.cls_token": (1.0, 0.24),
    "trunk.pos_embed": (1.0, 0.24),
    **{f"trunk.patch_embed.convs.{i}.weight": (1.0, 0.24) for i in range(3)},
    **{name: at for i in range(3) for name, at in vectors(f"trunk.patch_embed.norms.{i}").items()},
    **linear("trunk.patch_embed.proj", 1.0, 0.24),
    **block("trunk.blocks.0", 1.0, 0.24),
    **block("trunk.blocks.1", 1.0, 0.24),
    **vectors("trunk.norm"),
    **linear("head", 1.0, 0.24),
}
DECODER = {"decoder": {"width": 16, "depth": 1, "heads": 2}}
TABLES: list[tuple[str, dict[str, Any], Table]] = [
    ("pretrain/mae", DECODER, MAE_PRETRAIN),
    ("finetune/mae", {}, MAE_FINETUNE),
    ("finetune/mae_probe", {}, MAE_PROBE),
    ("pretrain/simple_vit", {}, SIMPLE_VIT),
    ("pretrain/vit_c", {}, VIT_C),
]


def build(recipe: str, changes: dict[str, Any]) -> tuple[Stage, OptimConfig]:
    """The recipe's stage, tiny, and its optimizer's settings."""
    document = load(str(ROOT / "configs" / f"{recipe}.yaml"), ["name=test", "data.train=none"])
    model = {**document["options"]["model"], **TINY}
    document["options"] = {**document["options"], **changes, "model": model}
    config = validate(TrainConfig, document, where=recipe)
    cls = stage_class(config.stage)
    return cls(validate(cls.options_class, config.options, where=recipe), DataFacts(("a", "b"))), config.optim


@pytest.mark.parametrize(("recipe", "changes", "table"), TABLES, ids=[recipe for recipe, _, _ in TABLES])
def test_every_parameter_gets_what_the_official_recipe_gives_it(
    recipe: str, changes: dict[str, Any], table: Table
) -> None:
    stage, optim = build(recipe, changes)
    groups = parameter_groups(stage, optim)
    actual = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert actual == {name: (pytest.approx(scale), decay) for name, (scale, decay) in table.items()}


def test_maes_pretraining_groups_are_timms() -> None:
    from timm.optim import param_groups_weight_decay

    stage, optim = build("pretrain/mae", DECODER)
    names = {id(p): name for name, p in stage.named_parameters()}
    theirs = {names[id(p)]: g["weight_decay"] for g in param_groups_weight_decay(stage, 0.05) for p in g["params"]}
    assert theirs == {n: g["weight_decay"] for g in parameter_groups(stage, optim) for n in g["names"]}


def test_lars_is_maes() -> None:
    """util/lars.py, after its formulas: matrices are rescaled by .001 |w| / |g|, vectors get the plain momentum update.
    At the recipe's weight decay of 0 timm's default would skip the rescaling. (With decay timm divides by
    |g| + decay |w|, as the paper and apex do, and MAE's code by |g + decay w|.)
    """
    stage, optim = build("finetune/mae_probe", {})
    head = stage.double().heads[0]  # type: ignore[index]
    optimizer = build_optimizer(parameter_groups(stage, optim), optim, 0.7)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    momenta = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(5):
        draw = torch.Generator().manual_seed(step)
        head.weight.grad = torch.randn(weight.shape, dtype=torch.float64, generator=draw)
        head.bias.grad = torch.randn(bias.shape, dtype=torch.float64, generator=draw)
        update = head.weight.grad * 0.001 * weight.norm() / head.weight.grad.norm()
        momenta = 0.9 * momenta[0] + update, 0.9 * momenta[1] + head.bias.grad
        weight, bias = weight - 0.7 * momenta[0], bias - 0.7 * momenta[1]
        optimizer.step()
    torch.testing.assert_close(head.weight.detach(), weight, rtol=1e-7, atol=1e-10)  # timm adds 1e-8 to |g|
    torch.testing.assert_close(head.bias.detach(), bias, rtol=1e-9, atol=0)
