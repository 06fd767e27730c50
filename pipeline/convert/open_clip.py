"""open_clip's models, native and custom-text, as files or as the folder that `open_clip.create_model_and_transforms`
loads by `local-dir:`. OpenAI's weights are of this format too, with `gelu=quick`.

Legend: D width of the trunk, W width of the text tower, E width of the embedding, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from pipeline.config import Document
from pipeline.convert.two_towers import (
    FlipParts,
    Towers,
    assembled,
    facts,
    renamed,
    taken_apart,
    without_patch_bias,
)
from pipeline.convert.weights import (
    Conventions,
    Format,
    Known,
    WeightFile,
    Weights,
    Written,
    complete,
    prefixed,
    refuse,
    under,
)
from pipeline.errors import CheckpointError
from pipeline.models.pixels import PIXEL_STATISTICS
from pipeline.models.text.tokenizer import BYTE_PAIRS
from pipeline.models.trunk.config import Gelu

CONVENTIONS = Conventions(interpolation="bicubic_antialias", norm_eps=1e-5, gelu="erf", pixels="clip")
TIMM_CONVENTIONS = CONVENTIONS._replace(norm_eps=1e-6, pixels="half")
BLOCKS = {
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".ls_1.": ".ls1.",
    ".ls_2.": ".ls2.",
}
IMAGE = BLOCKS | {"conv1.": "patch_embed.proj.", "ln_pre.": "norm_pre.", "ln_post.": "norm."}
TEXT = BLOCKS | {"ln_final.": "norm.", "positional_embedding": "pos_embed", "text_projection.": "projection."}
TEXT_PARTS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
POOLINGS = {"tok": "cls", "avg": "avg"}
TEXT_POOLINGS = {"argmax": "eot", "eos": "eot", "first": "first", "last": "last"}


class OpenClip(Format):
    """`open_clip.CLIP` and `open_clip.CustomTextCLIP` with a plain ViT (open_clip's own or timm's): stage `flip`."""

    name: ClassVar[str] = "open_clip"
    takes: ClassVar[tuple[str, ...]] = (
        "heads", "text_heads", "image_size", "norm_eps", "gelu", "pixels", "tokenizer",
    )  # fmt: skip
    wrapped_in: ClassVar[str | None] = "state_dict"
    config_file: ClassVar[str | None] = "open_clip_config.json"
    folder_files: ClassVar[tuple[str, ...]] = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

    def read(self, source: WeightFile, known: Known) -> Weights:
        config = facts(source.config, "model_cfg") or dict(source.config)
        state = {name: value for name, value in source.state.items() if name != "attn_mask"}
        said = _known_from_config(config, state) | {"pixels": _pixels(facts(source.config, "preprocess_cfg"))}
        by_timm = any(name.startswith("visual.trunk.") for name in state)
        known = complete(known, said, where=source.where)
        text = under(state, "text.") or {n: v for n, v in state.items() if n.startswith(TEXT_PARTS)}
        visual = under(state, "visual.")
        towers = Towers({}, _text(text), {n: state[n] for n in ("logit_scale", "logit_bias") if n in state})
        trunk, rest = _timm_image(visual) if by_timm else _image(visual, source.where)
        towers = towers._replace(trunk=trunk, rest={**rest, **towers.rest})
        used = {*text, *(f"text.{n}" for n in text), *(f"visual.{n}" for n in visual), *towers.rest}
        if left := [name for name in state if name not in used]:
            raise CheckpointError(
                f"it holds {', '.join(left[:4])}",
                where=source.where,
                fix="this variant of the architecture isn't known",
            )
        pooling = "map" if any(n.startswith("attn_pool.") for n in rest) else _pooling(config, by_timm, source.where)
        return assembled(
            towers,
            known,
            TIMM_CONVENTIONS if by_timm else CONVENTIONS,
            where=source.where,
            image={},
            text=_text_options(config, known, source.where),
            options={"pooling": pooling},
        )

    def write(self, weights: Weights, known: Known) -> Written:
        parts = taken_apart(weights, self.name)
        options, model, text = parts.options, parts.options.model, parts.options.text
        reasons = {
            f"pooling {options.pooling} (train with cls or avg)": options.pooling not in POOLINGS.values(),
            "a model without cls token": not model.cls_token,
            "images without projection": not options.projection,
            "a text tower with pooling cls or hidden padding": text.pooling == "cls" or text.mask_padding,
            "another GELU for texts than for images": text.gelu != model.gelu and "quick" in (text.gelu, model.gelu),
            "a trunk without final norm": not model.final_norm,
        }
        refuse(self.name, weights.where, reasons)
        state = prefixed(_their_image(parts), "visual.")
        custom = text.projection == "linear_bias" or not text.causal or text.pooling != "eot" or options.loss != "clip"
        state |= prefixed(_their_text(parts), "text." if custom else "")
        for name in ("logit_scale", "logit_bias"):
            if name in parts.rest:
                state[name] = parts.rest[name].reshape(())
        return Written(
            state, {"model_cfg": _describe(parts, custom), "preprocess_cfg": _preprocess(options.pixels)}, ()
        )


def _known_from_config(config: Document, state: Mapping[str, Tensor]) -> Document:
    """What the configuration says, as fields of Known."""
    image, text = facts(config, "vision_cfg"), facts(config, "text_cfg")
    said: Document = {"text_heads": text.get("heads", 8 if text else None)}
    conv = state.get("visual.conv1.weight")
    if image and conv is not None:
        said["heads"] = conv.shape[0] // image.get("head_width", 64)
        said["gelu"] = _gelu(config, image)
        said["norm_eps"] = facts(image, "norm_kwargs").get("eps")
        said["image_size"] = image.get("image_size", 224)
    return said


def _gelu(config: Document, tower: Document) -> Gelu:
    if config.get("quick_gelu"):
        return "quick"
    return "tanh" if facts(tower, "act_kwargs").get("approximate") == "tanh" else "erf"


def _pooling(config: Document, by_timm: bool, where: str) -> str:
    image = facts(config, "vision_cfg")
    how = image.get("timm_pool", "avg") if by_timm else image.get("pool_type", "tok")
    known = {"avg": "avg", "token": "cls"} if by_timm else POOLINGS
    if how not in known or image.get("attentional_pool") or image.get("final_ln_after_pool"):
        raise CheckpointError(f"it pools images by {how!r} in a way ours can't", where=where, fix="give another model")
    return known[how]


def _text_options(config: Document, known: Known, where: str) -> Document:
    text = facts(config, "text_cfg")
    if not text:
        return {}
    how = text.get("pool_type", "argmax")
    if how not in TEXT_POOLINGS or text.get("embed_cls") or text.get("hf_model_name"):
        raise CheckpointError(
            f"its text tower ({text.get('hf_model_name') or how}) is none of ours",
            where=where,
            fix="give a model with open_clip's own text transformer, without embed_cls",
        )
    options: Document = {"pooling": TEXT_POOLINGS[how], "causal": not text.get("no_causal_mask", False)}
    eps = facts(text, "norm_kwargs").get("eps", 1e-5)
    return options | {"norm_eps": eps, "gelu": _gelu(config, text) if known.gelu is None else known.gelu}


def _image(visual: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """open_clip's own vision transformer: our trunk, and the projection."""
    state = renamed(visual, IMAGE)
    if "class_embedding" not in state or "positional_embedding" not in state:
        raise CheckpointError("no visual.class_embedding", where=where, fix="give a CLIP with a vision transformer")
    state["cls_token"] = state.pop("class_embedding")[None, None]
    state["pos_embed"] = state.pop("positional_embedding")[None]
    projection = state.pop("proj", None)
    return state, {} if projection is None else {"image_projection.weight": projection.T}


def _timm_image(visual: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A ViT of timm's: the names are ours."""
    state = under(visual, "trunk.")
    rest = {name: state.pop(name) for name in list(state) if name.startswith("attn_pool.")}
    if "head.proj.weight" in visual:
        rest["image_projection.weight"] = visual["head.proj.weight"]
    return state, rest


def _text(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    text = renamed(state, TEXT)
    if "text_projection" in text:
        text["projection.weight"] = text.pop("text_projection").T
    return {name: value for name, value in text.items() if name != "attn_mask"}


def _their_image(parts: FlipParts) -> dict[str, Tensor]:
    state = renamed(without_patch_bias(parts.trunk), {ours: theirs for theirs, ours in IMAGE.items()})
    state["class_embedding"] = state.pop("cls_token")[0, 0]
    state["positional_embedding"] = state.pop("pos_embed")[0]
    state["proj"] = parts.rest["image_projection.weight"].T
    return state


def _their_text(parts: FlipParts) -> dict[str, Tensor]:
    state = dict(parts.text)
    if parts.options.text.projection == "linear":
        state["text_projection"] = state.pop("projection.weight").T
    return renamed(state, {ours: theirs for theirs, ours in TEXT.items()})


def _describe(parts: FlipParts, custom: bool) -> Document:
    options, model, text = parts.options, parts.options.model, parts.options.text
    width, depth, mlp_width, heads = model.shape
    height, across = model.image_hw
    image: Document = {
        "image_size": height if height == across else [height, across],
        "layers": depth,
        "width": width,
        "head_width": width // heads,
        "patch_size": model.patch_size,
        "mlp_ratio": mlp_width / width,
        "pool_type": {ours: theirs for theirs, ours in POOLINGS.items()}[options.pooling],
        "no_ln_pre": not model.pre_norm,
        "norm_kwargs": {"eps": model.norm_eps},
    }
    tower: Document = {
        "context_length": text.context_length,
        "vocab_size": parts.text["token_embedding.weight"].shape[0],
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": (text.mlp_width or 4 * text.width) / text.width,
        "no_causal_mask": not text.causal,
        "pool_type": {"eot": "argmax"}.get(text.pooling, text.pooling),
        "proj_bias": text.projection == "linear_bias",
        "proj_type": "none" if text.projection == "none" else "linear",
        "norm_kwargs": {"eps": text.norm_eps},
    }
    for section, gelu in ((image, model.gelu), (tower, text.gelu)):
        if gelu == "tanh":
            section["act_kwargs"] = {"approximate": "tanh"}
    if model.layer_scale is not None:
        image["ls_init_value"] = model.layer_scale
    if text.tokenizer != BYTE_PAIRS:
        tower["hf_tokenizer_name"] = text.tokenizer
    config: dict[str, Any] = {"embed_dim": options.embed_dim, "vision_cfg": image, "text_cfg": tower}
    config |= {"quick_gelu": True} if model.gelu == "quick" else {}
    config |= {"custom_text": True} if custom else {}
    return config | ({"init_logit_bias": -10.0} if options.loss == "siglip" else {})


def _pixels(preprocess: Document) -> str | None:
    """The statistics whose mean it is."""
    mean = preprocess.get("mean")
    known = (name for name, (ours, _) in PIXEL_STATISTICS.items() if mean and list(ours) == list(mean))
    return next(known, None)


def _preprocess(pixels: str) -> Document:
    mean, deviation = PIXEL_STATISTICS[pixels]
    return {"mean": list(mean), "std": list(deviation), "interpolation": "bicubic", "resize_mode": "shortest"}
