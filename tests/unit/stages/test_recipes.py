"""The shipped recipes: every file is valid at every size it names, and holds the papers' numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import load, validate
from pipeline.models.trunk.config import SIZES
from pipeline.models.trunk.vit import ViT
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts
from pipeline.train.config import TrainConfig
from pipeline.train.optim import peak_rate, scheduled_rate

EPOCH = 1281167  # images of ImageNet-1k's training set
FOLDERS = ("pretrain", "finetune")
ROOT = Path(__file__).parents[3]
RECIPES = sorted(
    str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / "configs" / folder).glob("*.yaml")
)


def read(recipe: str, size: str | None = None) -> tuple[TrainConfig, Any]:
    """The envelope and the stage's options."""
    settings = ["name=test", "data.train=somewhere"] + ([] if size is None else [f"options.model.size={size}"])
    document = load(ROOT / recipe, settings)
    config = validate(TrainConfig, document, where=recipe)
    return config, validate(stage_class(config.stage).options_class, config.options, where=recipe, prefix="options")


def sizes_of(recipe: str) -> list[str | None]:
    return [None, *yaml.safe_load((ROOT / recipe).read_text()).get("sizes", {})]


@pytest.mark.parametrize(("recipe", "size"), [(recipe, size) for recipe in RECIPES for size in sizes_of(recipe)])
def test_every_recipe_is_valid_at_every_size(recipe: str, size: str | None) -> None:
    config, options = read(recipe, size)
    assert size in (None, options.model.size)
    with torch.device("meta"):
        stage_class(config.stage)(options, DataFacts(classes=("a", "b")))


def numbers(config: TrainConfig, options: Any) -> dict[str, Any]:
    """What the papers' tables give, in their units."""
    model, optim = options.model, config.optim
    actual = {
        "shape": tuple(model.shape), "patch": model.patch_size, "epochs": config.length_samples / EPOCH,
        "warmup": optim.warmup_samples / EPOCH, "batch": config.data.global_batch, "base_lr": optim.base_lr,
        "lr": optim.lr, "wd": optim.weight_decay, "betas": optim.betas, "decay": optim.layer_decay,
        "drop_path": model.drop_path, "min_lr": optim.min_lr, "clip": optim.clip_grad, "crop": options.crop_scale,
        "position": model.position, "gelu": model.gelu, "eps": model.norm_eps, "schedule": optim.schedule,
        "stem": model.stem if model.patch_embed == "conv_stem" else None,
        "ema": config.ema and 1 - 0.5 ** (config.data.global_batch / config.ema.half_life_samples),
        "cls": model.cls_token, "trained": model.position_trained, "optimizer": optim.name,
    }  # fmt: skip
    return actual | {key: value for key, value in options.model_dump().items() if key not in ("model", "crop_scale")}


MAE = {
    "batch": 4096, "base_lr": 1.5e-4, "wd": 0.05, "betas": (0.9, 0.95), "epochs": 800, "warmup": 40, "min_lr": 0,
    "crop": (0.2, 1.0), "clip": 0, "drop_path": 0, "eps": 1e-6, "position": "sincos2d", "trained": False,
    "gelu": "erf", "flip": True, "schedule": "cosine", "optimizer": "adamw", "decay": 1,
}  # fmt: skip
MAE_DECODER = {"attention": "self", "feature_maps": False, "width": 512, "depth": 8, "heads": 16}
MAE_TASK = {"decoder": MAE_DECODER, "mask_ratio": 0.75, "norm_pix": True, "masking": "random", "predict_ratio": None}
FINETUNE = {
    "batch": 1024, "wd": 0.05, "betas": (0.9, 0.999), "warmup": 5, "min_lr": 1e-6, "random_erase": 0.25, "mixup": 0.8,
    "auto_augment": "rand-m9-mstd0.5-inc1", "cutmix": 1.0, "label_smoothing": 0.1, "pooling": "avg",
    "head_init_std": 2e-5, "crop": (0.08, 1.0), "trained": True, "optimizer": "adamw", "cls": True, "clip": 0,
    "ema": pytest.approx(1e-4, rel=1e-3),
}  # fmt: skip
SCRATCH = {
    "batch": 4096, "base_lr": 1e-4, "wd": 0.3, "betas": (0.9, 0.95), "warmup": 20,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "ema": pytest.approx(1e-4, rel=1e-3), "random_erase": 0,
    "position": "sincos2d", "decay": 1, "clip": 0,
}  # fmt: skip
LARGE = {"base_lr": 1e-3, "decay": 0.75, "epochs": 50}
PROBE = {
    "batch": 16384, "base_lr": 0.1, "wd": 0, "warmup": 10, "optimizer": "lars", "pooling": "cls", "cls": True,
    "head_init_std": 0.01, "lr_multipliers": (1.0,), "crop": (0.08, 1.0), "min_lr": 0,
}  # fmt: skip
VIT_C = {
    "patch": 16, "epochs": 400, "warmup": 5, "batch": 2048, "auto_augment": "original", "mixup": 0.8, "cutmix": 1.0,
    "label_smoothing": 0.1, "betas": (0.9, 0.999), "optimizer": "adamw",
    "ema": pytest.approx(1e-5 * 2048 / 400, rel=2e-3),  # pycls: 32 times that, every 32 steps
}  # fmt: skip
SAM = {
    "patch": 16, "wd": 0.1, "betas": (0.9, 0.999), "schedule": "step", "epochs": pytest.approx(90_000 * 256 / EPOCH),
    "clicks": 8, "repeats": 2, "point_share": 0.5, "box_noise": 0.1, "max_box_noise": 20, "max_objects": 64,
    "max_area": 0.9, "focal_weight": 20, "dice_weight": 1, "iou_weight": 1, "flip": False, "jitter": None, "cls": False,
}  # fmt: skip
SMALL_RATE, LARGE_RATE = {"lr": 1e-3, "wd": 0.24}, {"lr": 6e-4, "wd": 0.28}
VITDET = {
    "patch": 16, "batch": 64, "lr": 1e-4, "wd": 0.1, "betas": (0.9, 0.999), "schedule": "step", "cls": False,
    "position": "sincos2d", "trained": True, "eps": 1e-6, "gelu": "erf", "optimizer": "adamw", "jitter": (0.1, 2.0),
    "flip": True, "pyramid": "simple", "clip": 0, "decay_norms": False,
}  # fmt: skip
FPN = {"lr": 8e-5, "schedule": "cosine", "decay": 1.0, "pyramid": "fpn"}
LARGE_STEM = (64, 128, 128, 256, 256, 512)
B, L, H = (768, 12, 3072, 12), (1024, 24, 4096, 16), (1280, 32, 5120, 16)
# Width, heads and blocks of the text tower are compared in `test_text_towers_are_the_papers`.
TWO_TOWERS: dict[str | None, dict[str, Any]] = {None: {"shape": B}, "L": {"shape": L}, "H": {"shape": H}}
FLIP = {
    "batch": 65536, "base_lr": 4e-6, "wd": 0.2, "betas": (0.9, 0.95), "epochs": 10000, "crop": (0.5, 1.0),
    "mask_ratio": 0.5, "position": "sincos2d", "gelu": "tanh", "eps": 1e-6, "pooling": "avg_with_cls", "flip": True,
    "cls": True, "decay_positions": False, "schedule": "cosine", "min_lr": 0, "clip": 0, "loss": "clip",
}  # fmt: skip
FLIP_TUNE = FLIP | {"base_lr": 4e-8, "mask_ratio": 0.0, "epochs": 128e6 / EPOCH, "warmup": 25.6e6 / EPOCH}
CLIP = {
    "wd": 0.2, "betas": (0.9, 0.98), "batch": 32768, "epochs": 12.8e9 / EPOCH, "warmup": 2000 * 32768 / EPOCH,
    "pixels": "clip", "gelu": "quick", "position": "learned", "pooling": "cls", "eps": 1e-5, "mask_ratio": 0.0,
}  # fmt: skip
OPEN_CLIP = {"wd": 0.2, "betas": (0.9, 0.98), "lr": 5e-4, "gelu": "erf", "pooling": "cls", "position": "learned"}
SIGLIP = {
    "lr": 1e-3, "wd": 0.1, "betas": (0.9, 0.95), "batch": 32768, "pixels": "half", "pooling": "map", "cls": False,
    "loss": "siglip", "projection": False, "init_bias": -10.0, "clip": 1.0,
}  # fmt: skip
LIT = OPEN_CLIP | {"freeze": ("trunk.",), "batch": 16384, "lr": 1e-3, "wd": 1e-4, "clip": 1.0}
TABLE: list[tuple[str, str | None, dict[str, Any]]] = [
    ("pretrain/mae", None, MAE | MAE_TASK | {"shape": B, "patch": 16}),
    ("pretrain/mae", "L", MAE | MAE_TASK | {"shape": L, "patch": 16}),
    ("pretrain/mae", "H", MAE | MAE_TASK | {"shape": H, "patch": 14}),
    ("pretrain/mp3", None, MAE | {"shape": B, "context_ratio": 0.25}),
    ("pretrain/vit", None, SCRATCH | {"shape": B, "patch": 16, "drop_path": 0.1, "epochs": 300}),
    ("pretrain/vit", "L", SCRATCH | {"shape": L, "patch": 16, "drop_path": 0.2, "epochs": 200}),
    ("pretrain/vit", "H", SCRATCH | {"shape": H, "patch": 14, "drop_path": 0.2, "epochs": 200}),
    ("finetune/mae", None, FINETUNE | {"shape": B, "base_lr": 5e-4, "decay": 0.65, "drop_path": 0.1, "epochs": 100}),
    ("finetune/mae", "L", FINETUNE | LARGE | {"shape": L, "patch": 16, "drop_path": 0.2}),
    ("finetune/mae", "H", FINETUNE | LARGE | {"shape": H, "patch": 14, "drop_path": 0.3}),
    ("finetune/mae_probe", None, PROBE | {"shape": B, "epochs": 90}),
    ("finetune/mae_probe", "L", PROBE | {"shape": L, "epochs": 50}),
    ("finetune/mae_probe", "H", PROBE | {"shape": H, "epochs": 50, "patch": 14}),
    (
        "pretrain/simple_vit", None,
        {
            "shape": (384, 12, 1536, 6), "patch": 16, "position": "sincos2d_bigvision", "cls": False, "lr": 1e-3,
            "pooling": "avg_with_cls", "pre_logits": True, "head_init_std": 0, "batch": 1024, "wd": 0.1, "epochs": 90,
            "betas": (0.9, 0.999), "warmup": 10_000 * 1024 / EPOCH, "clip": 1.0, "gelu": "tanh", "pixels": "half",
            "auto_augment": "rand-m10-n2", "mixup": 0.2, "cutmix": 0, "label_smoothing": 0, "crop": (0.05, 1.0),
        },
    ),
    ("pretrain/vit_c", "C-1GF", VIT_C | SMALL_RATE | {"shape": (192, 11, 576, 3), "stem": (24, 48, 96, 192)}),
    ("pretrain/vit_c", "C-4GF", VIT_C | SMALL_RATE | {"shape": (384, 11, 1152, 6), "stem": (48, 96, 192, 384)}),
    ("pretrain/vit_c", "C-18GF", VIT_C | SMALL_RATE | {"shape": (768, 11, 3072, 12), "stem": LARGE_STEM}),
    *(
        (f"finetune/{recipe}", size, VITDET | {"shape": shape, "decay": decay, "drop_path": drop})
        for recipe in ("vitdet", "vitdet_cascade")
        for size, shape, decay, drop in ((None, B, 0.7, 0.1), ("L", L, 0.8, 0.4))
    ),
    *(
        (f"finetune/{recipe}", "H", VITDET | {"shape": H, "decay": 0.9, "drop_path": 0.5, "decay_norms": True})
        for recipe in ("vitdet", "vitdet_cascade")
    ),
    ("finetune/vitdet_fpn", None, VITDET | FPN | {"shape": B, "drop_path": 0.1}),
    ("finetune/vitdet_fpn", "L", VITDET | FPN | {"shape": L, "drop_path": 0.3}),
    ("pretrain/vit_c", "C-36GF", VIT_C | LARGE_RATE | {"shape": (1024, 13, 4096, 16), "stem": LARGE_STEM}),
    *(
        (f"{folder}/{name}", size, facts | TWO_TOWERS[size])
        for folder, name, facts in (
            ("pretrain", "flip", FLIP), ("finetune", "flip_tune", FLIP_TUNE), ("pretrain", "clip", CLIP),
            ("pretrain", "open_clip", OPEN_CLIP), ("pretrain", "siglip", SIGLIP), ("finetune", "lit", LIT),
        )
        for size in (None, "L", "H")
    ),
    ("finetune/sam", None, SAM | {"shape": B, "lr": 8e-4, "decay": 0.6, "drop_path": 0.6, "batch": 128}),
    ("finetune/sam", "L", SAM | {"shape": L, "lr": 4e-4, "decay": 0.8, "drop_path": 0.4, "batch": 128}),
    ("finetune/sam", "H", SAM | {"shape": H, "lr": 8e-4, "decay": 0.8, "drop_path": 0.4, "batch": 256}),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "size", "expected"), TABLE)
def test_recipes_hold_the_papers_numbers(recipe: str, size: str | None, expected: dict[str, Any]) -> None:
    actual = numbers(*read(f"configs/{recipe}.yaml", size))
    assert {key: actual[key] for key in expected} == expected


def test_the_table_covers_every_recipe() -> None:
    assert {f"configs/{recipe}.yaml" for recipe, _, _ in TABLE} == set(RECIPES)


TEXT_TOWERS = {  # width, heads, blocks, embedding, context
    "pretrain/flip": {None: (512, 8, 12, 512, 32), "L": (768, 12, 12, 768, 32), "H": (1024, 16, 24, 1024, 32)},
    "pretrain/clip": {None: (512, 8, 12, 512, 77), "L": (768, 12, 12, 768, 77)},
    "pretrain/open_clip": {None: (512, 8, 12, 512, 77), "L": (768, 12, 12, 768, 77), "H": (1024, 16, 24, 1024, 77)},
    "pretrain/siglip": {None: (768, 12, 12, 768, 64), "L": (1024, 16, 24, 1024, 64)},
}


@pytest.mark.parametrize(("recipe", "size"), [(name, size) for name, sizes in TEXT_TOWERS.items() for size in sizes])
def test_text_towers_are_the_papers(recipe: str, size: str | None) -> None:
    _, options = read(f"configs/{recipe}.yaml", size)
    text = options.text
    actual = (text.width, text.heads, text.layers, options.embed_dim, text.context_length)
    assert actual == TEXT_TOWERS[recipe][size]


@pytest.mark.parametrize(("size", "name"), [(None, "ViT-B-16"), ("L", "ViT-L-14"), ("H", "ViT-H-14")])
def test_open_clips_recipe_has_open_clips_shapes(size: str | None, name: str) -> None:
    """Its own configuration files say what the models are."""
    import json

    import open_clip

    theirs = json.loads((Path(open_clip.__file__).parent / "model_configs" / f"{name}.json").read_text())
    _, options = read("configs/pretrain/open_clip.yaml", size)
    vision, text = theirs["vision_cfg"], theirs["text_cfg"]
    assert options.embed_dim == theirs["embed_dim"]
    assert options.model.shape[:2] == (vision["width"], vision["layers"])
    assert options.model.patch_size == vision["patch_size"]
    assert options.model.shape.heads == vision["width"] // vision.get("head_width", 64)
    assert (options.text.width, options.text.heads, options.text.layers) == (
        text["width"], text["heads"], text["layers"],
    )  # fmt: skip


def test_global_batches_and_warm_ups_of_open_clip_are_documented_ones() -> None:
    batches = {None: 33792, "L": 38400, "H": 79104}
    for size, batch in batches.items():
        config = read("configs/pretrain/open_clip.yaml", size)[0]
        assert config.data.global_batch == batch
        assert config.optim.warmup_samples == 2000 * batch
    assert [read("configs/pretrain/flip.yaml", s)[0].optim.warmup_samples / EPOCH for s in (None, "H")] == [20, 200]


def test_the_official_flips_text_tower_can_be_said(tmp_path: Path) -> None:
    """As the recipe's comment does."""
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(30520))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    text = f"{{tokenizer: {tmp_path}/vocab.txt, vocab_size: 30523, causal: false, pooling: first, gelu: tanh}}"
    document = load(ROOT / "configs/pretrain/flip.yaml", ["name=a", "data.train=b", f"options.text={text}"])
    options = validate(stage_class("flip").options_class, document["options"], where="flip")
    with torch.device("meta"):
        stage = stage_class("flip")(options, DataFacts())
    assert stage.text.token_embedding.weight.shape == (30523, 512)


@pytest.mark.parametrize(("size", "steps"), [(None, 180_000), ("L", 180_000), ("H", 90_000)])
def test_segment_anything_drops_its_rate_where_the_paper_does(size: str | None, steps: int) -> None:
    config, _ = read("configs/finetune/sam.yaml", size)
    batch = config.data.global_batch
    assert config.length_samples == steps * batch
    assert config.optim.warmup_samples == 250 * batch
    passed = [round(share * steps) for share in config.optim.drops]
    assert passed == [steps * 2 // 3, pytest.approx(86_666 * steps / 90_000, abs=1)]


def test_scaled_rates_are_the_papers() -> None:
    assert peak_rate(read("configs/pretrain/mae.yaml")[0].optim, 4096) == pytest.approx(2.4e-3)
    assert peak_rate(read("configs/finetune/mae_probe.yaml")[0].optim, 16384) == pytest.approx(6.4)


def test_sizes_are_the_papers() -> None:
    """Width, depth, MLP width, heads."""
    expected = {
        "Ti": (192, 12, 768, 3), "S": (384, 12, 1536, 6), "B": B, "L": L, "H": H,
        "So400m": (1152, 27, 4304, 16), "g": (1408, 40, 6144, 16), "G": (1664, 48, 8192, 16),
    }  # fmt: skip
    assert {name: tuple(SIZES[name]) for name in expected} == expected


def test_the_decoupled_decay_of_simple_vit_shrinks_weights_as_optax_does() -> None:
    """The trap: optax adds 1e-4 x weight after scaling by the rate, torch multiplies it by the rate."""
    optim = read("configs/pretrain/simple_vit.yaml")[0].optim
    assert optim.lr is not None
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight], lr=optim.lr, weight_decay=optim.weight_decay).step()
    torch.testing.assert_close(weight.data, torch.tensor([1 - 1e-4]))


def test_a_trunk_of_each_stem_halves_down_to_patches() -> None:
    _, options = read("configs/pretrain/vit_c.yaml", "C-18GF")
    with torch.device("meta"):
        trunk = ViT(options.model)
        patches = trunk.patch_embed(torch.empty(1, 3, 224, 224))
    assert patches.shape == (1, 196, 768)


@pytest.mark.parametrize(
    ("size", "depth", "iterations", "drops"),
    [("B", 12, 184375, (163889, 177546)), ("L", 24, 184375, (163889, 177546)), ("H", 32, 138281, (122916, 133159))],
)
def test_vitdet_trains_as_long_as_detectron2_and_lowers_the_rate_at_the_same_iterations(
    size: str, depth: int, iterations: int, drops: tuple[int, int]
) -> None:
    config, options = read("configs/finetune/vitdet.yaml", size)
    assert config.length_samples == 64 * iterations
    assert options.model.global_blocks == tuple(depth // 4 * quarter - 1 for quarter in (1, 2, 3, 4))
    assert (options.model.window, options.model.grid, options.model.position_grid) == (14, (64, 64), (14, 14))

    def rate(iteration: int) -> float:
        return scheduled_rate(config.optim, 1e-4, 64 * iteration, config.length_samples)

    assert rate(250) == rate(drops[0] - 1) == pytest.approx(1e-4)
    assert rate(drops[0]) == rate(drops[1] - 1) == pytest.approx(1e-5)
    assert rate(drops[1]) == rate(iterations - 1) == pytest.approx(1e-6)
    assert (rate(0), rate(125)) == pytest.approx((1e-7, 0.5005e-4))  # 250 iterations of warm-up, from .001
    cascade, plain = (read(f"configs/finetune/{name}.yaml", size)[1] for name in ("vitdet_cascade", "vitdet"))
    assert (cascade.detector.cascade, plain.detector.cascade) == (True, False)
