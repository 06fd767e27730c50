"""Segment Anything against the package segment-anything, with the same random weights: ViT-B at half the paper's side.

CPU time of one thread, in fp32 on both sides. Automatic masks: a quarter of the masks that the model is asked for pass
the threshold on predicted IoU, as of a trained model about so many do; equal masks are a condition. A training step
encodes a batch, asks about 8 boxes in each image and goes backward; the package's decoder takes one image at a time.
Steps are compared at a quarter of the paper's side, so that eight images fit. The last comparison is of ours alone: a
step of the stage's own loop with its eleven rounds, and with the two that it can't do without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from benchmarks.harness import Comparison, Contender, Goal, UnequalWork, Work, compare

SIDE, PATCH = 512, 16
STEP_SIDE = 256
POINTS_PER_SIDE = 16
SHARE_PASSING = 0.25
NUM_PROMPTS = 64
BOXES_PER_IMAGE = 8
TOLERANCE = 1e-3  # of logits, whose standard deviation is about 1


class Models(NamedTuple):
    """Ours and the package's, with equal weights."""

    stage: Any
    official: Any


def run(pairs: int) -> list[Comparison]:
    """`sam-automatic`, `sam-prompts`, `sam-train-1`, `-4` and `-8`, and `sam-rounds`."""
    torch.set_num_threads(1)
    models = both(SIDE)
    image = picture()
    results = [automatic(models, image, pairs), prompts(models, image, pairs), rounds(pairs)]
    models = both(STEP_SIDE)
    return results + [training(models, num, pairs) for num in (1, 4, 8)]


def both(side: int) -> Models:
    """ViT-B for images of `side` with weights drawn once."""
    from segment_anything.modeling import Sam

    from pipeline.convert import FORMATS
    from pipeline.convert.weights import Known, WeightFile, build

    torch.manual_seed(0)
    official: Sam = package_model(side)
    with torch.no_grad():
        for parameter in official.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    weights = FORMATS["segment_anything"].read(WeightFile("drawn", dict(official.state_dict()), {}), Known())
    return Models(build(weights)[0].eval(), official.eval())


def package_model(side: int) -> Any:
    """The package's ViT-B for images of `side`."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = side // PATCH
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=14,
            global_attn_indexes=(2, 5, 8, 11),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=256, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=256,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        ),
    )


def picture() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Patches of colour, 480 x 640."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (12, 16, 3)).repeat(40, 0).repeat(40, 1)
    return (coarse + draw.integers(-20, 20, coarse.shape)).clip(0, 255).astype(np.uint8)


def automatic(models: Models, image: np.ndarray[Any, np.dtype[np.uint8]], pairs: int) -> Comparison:
    """Masks of everything in one image."""
    from segment_anything import SamAutomaticMaskGenerator

    from pipeline.models.sam.automatic import AutomaticSettings, automatic_masks, point_grid
    from pipeline.models.sam.predictor import ImagePrompts

    predictor = models.stage.predictor()
    points = point_grid(POINTS_PER_SIDE) * torch.tensor([image.shape[1], image.shape[0]])
    asked = predictor.predict(predictor.embed([image]), [ImagePrompts(points.unsqueeze(1)[::8])], multimask=True)[0]
    threshold = float(asked.iou.quantile(1 - SHARE_PASSING))
    settings = AutomaticSettings(points_per_side=POINTS_PER_SIDE, min_iou=max(threshold, 1e-6), min_stability=0, nms=1)
    generator = SamAutomaticMaskGenerator(
        models.official,
        points_per_side=POINTS_PER_SIDE,
        pred_iou_thresh=settings.min_iou,
        stability_score_thresh=0.0,
        box_nms_thresh=1.0,
        output_mode="coco_rle",
    )
    return compare(
        "sam-automatic",
        f"masks of everything in an image, {POINTS_PER_SIDE}^2 points",
        Contender("vitrail", functools.partial(automatic_masks, predictor, image, settings)),
        Contender("segment-anything", functools.partial(generator.generate, image)),
        check=same_masks,
        pairs=pairs,
        clock="cpu",
        work=Work(1, "images"),
        goal=Goal(ratio_min=2.0),
        notes={"side": SIDE, "share_passing": SHARE_PASSING, "threads": 1},
    )


def same_masks(ours: Any, theirs: Any) -> bool:
    """As many, 99 of 100 with an IoU of .99."""
    wanted = [mask["segmentation"] for mask in theirs if mask["area"] > 0]
    if len(ours) != len(wanted) or not wanted:
        raise UnequalWork(f"{len(ours)} masks and {len(wanted)}")
    iou = coco_mask.iou([mask.segmentation for mask in ours], wanted, [0] * len(wanted))
    return bool((iou.max(1) >= 0.99).mean() >= 0.99 and (iou.max(0) >= 0.99).mean() >= 0.99)


def prompts(models: Models, image: np.ndarray[Any, np.dtype[np.uint8]], pairs: int) -> Comparison:
    """Boxes in an image that is embedded already."""
    from segment_anything import SamPredictor

    from pipeline.models.sam.predictor import ImagePrompts

    corner = torch.rand(NUM_PROMPTS, 2, generator=torch.Generator().manual_seed(1)) * 300
    boxes = torch.cat([corner, corner + 120], dim=1)
    predictor, theirs = models.stage.predictor(), SamPredictor(models.official)
    embedded = predictor.embed([image])
    theirs.set_image(image)
    moved = theirs.transform.apply_boxes_torch(boxes, image.shape[:2])
    return compare(
        "sam-prompts",
        f"{NUM_PROMPTS} boxes in one embedded image, three masks each at its size",
        Contender("vitrail", lambda: predictor.predict(embedded, [ImagePrompts(boxes=boxes)])[0].logits),
        Contender("segment-anything", lambda: theirs.predict_torch(None, None, moved, return_logits=True)[0]),
        check=close,
        pairs=pairs,
        clock="cpu",
        work=Work(NUM_PROMPTS, "prompts"),
        notes={"side": SIDE, "threads": 1},
    )


def training(models: Models, num_images: int, pairs: int) -> Comparison:
    """Forward and backward of a batch; the outputs compared are the masks."""
    pixels = torch.randn(num_images, 3, STEP_SIDE, STEP_SIDE, generator=torch.Generator().manual_seed(2))
    corner = torch.rand(num_images, BOXES_PER_IMAGE, 2, generator=torch.Generator().manual_seed(3)) * (STEP_SIDE / 2)
    boxes = torch.cat([corner, corner + STEP_SIDE / 3], dim=2)
    ours = functools.partial(our_masks, models.stage, pixels, boxes)
    theirs = functools.partial(their_masks, models.official, pixels, boxes)
    return compare(
        f"sam-train-{num_images}",
        f"a training step of {num_images} image(s) with {BOXES_PER_IMAGE} boxes each",
        Contender("vitrail", stepping(models.stage, ours)),
        Contender("segment-anything", stepping(models.official, theirs)),
        check=close,
        pairs=pairs,
        clock="cpu",
        work=Work(num_images, "images"),
        notes={"side": STEP_SIDE, "threads": 1},
    )


def rounds(pairs: int) -> Comparison:
    """Forward and backward of the stage's own loss, on one image with eight objects."""
    many, few = (stage_step(clicks, repeats) for clicks, repeats in ((8, 2), (1, 0)))
    return compare(
        "sam-rounds",
        f"a training step of the stage, ViT-B, one image with {BOXES_PER_IMAGE} objects",
        Contender("11 rounds", many),
        Contender("2 rounds", few),
        check=lambda ours, peer: bool(torch.isfinite(torch.stack([ours, peer])).all()),
        pairs=pairs,
        clock="cpu",
        work=Work(1, "images"),
        notes={"side": SIDE, "threads": 1, "paper": "the decoder is under 1% of ViT-H's encoder at 1024 pixels"},
    )


def stage_step(clicks: int, repeats: int) -> Callable[[], Tensor]:
    """The loop with so many corrections."""
    from pipeline.config import validate
    from pipeline.data.batch import Batch, Instances
    from pipeline.data.images.views import fitted
    from pipeline.stages.base import DataFacts
    from pipeline.stages.sam import SamOptions, SamStage

    model = {
        "size": "B", "image_size": SIDE, "patch_size": PATCH, "cls_token": False, "final_norm": False,
        "relative_positions": True, "window": 14, "global_blocks": [2, 5, 8, 11],
    }  # fmt: skip
    torch.manual_seed(0)
    stage = SamStage(
        validate(SamOptions, {"model": model, "clicks": clicks, "repeats": repeats}, where="benchmark"), DataFacts()
    )
    masks = np.zeros((SIDE, SIDE, BOXES_PER_IMAGE), np.uint8, order="F")
    boxes = [(40.0 * i, 30.0 * i, 40.0 * i + 150, 30.0 * i + 200) for i in range(BOXES_PER_IMAGE)]
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        masks[int(y0) : int(y1), int(x0) : int(x1), number] = 1
    none = torch.zeros(BOXES_PER_IMAGE, dtype=torch.int64)
    view = fitted(SIDE, SIDE, (SIDE, SIDE))
    objects = Instances(torch.tensor(boxes), none, tuple(coco_mask.encode(masks)), none, view)
    image = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    batch = Batch(
        torch.zeros(1, dtype=torch.int64), torch.ones(1).long(), torch.ones(1), 0, image, instances=(objects,)
    )

    def step() -> Tensor:
        stage.zero_grad()
        loss = stage.loss(batch).total
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def stepping(model: torch.nn.Module, masks: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Forward, and backward of the masks' squares."""

    def step() -> Tensor:
        model.zero_grad()
        output = masks()
        output.square().mean().backward()  # type: ignore[no-untyped-call]
        return output.detach()

    return step


def our_masks(stage: Any, pixels: Tensor, boxes: Tensor) -> Tensor:
    """All images in one batch."""
    from pipeline.models.sam.prompts import join_prompts, prompts_of

    asked = join_prompts([prompts_of(boxes=box, image=i) for i, box in enumerate(boxes)])
    logits: Tensor = stage.model.decode(stage.model.embed(pixels), asked).logits
    return logits


def their_masks(official: Any, pixels: Tensor, boxes: Tensor) -> Tensor:
    """One batch for the encoder, image by image for the decoder."""
    logits = []
    for features, prompted in zip(official.image_encoder(pixels), boxes, strict=True):
        sparse, dense = official.prompt_encoder(points=None, boxes=prompted, masks=None)
        positions = official.prompt_encoder.get_dense_pe()
        logits.append(official.mask_decoder.predict_masks(features[None], positions, sparse, dense)[0])
    return torch.cat(logits)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for rounding, and not nothing."""
    return bool((ours - theirs).abs().max() <= TOLERANCE * theirs.std() and theirs.std() > 0)
