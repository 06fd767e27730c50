"""COCO's average precision and recall of boxes and masks (Lin et al. 2014; pycocotools' `COCOeval`).

Computed by faster-coco-eval, whose C++ code gives pycocotools' numbers. Objects and detections are compared in pixels
of the stored images, at whatever size the stage saw them.

Legend: B images, D detections, M side of a predicted mask.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from pipeline import ranks
from pipeline.data.batch import Batch, Instances
from pipeline.evaluate.base import Measured, Predict, Predictions, Sweep
from pipeline.models.detection.masks import encode_masks, paste_masks

MAX_DETECTIONS = (1, 10, 100)
MAX_PROPOSALS = 1000
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
RECALLS = ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
Kind = Literal["bbox", "segm"]
Annotation = dict[str, Any]


class Truth(NamedTuple):
    """The annotated objects of an image."""

    size: tuple[int, int]  # height and width of the stored image
    objects: list[Annotation]


class CocoEvaluation:
    """`<set>/box_ap`, `box_ap50`, ... `box_ar100`, ... and `mask_*` alike, from a stage's detections.

    Predictions needed, each with leading dimension B: `boxes` [B,D,4] in pixels of the image in the batch, `scores` and
    `classes` [B,D], `counts` [B] of those that are real, and for mask figures `masks` [B,D,M,M], probabilities.

    Objects come from the batch's instances, in pixels of the stored image; crowd regions are treated as COCO treats
    them. A figure that is undefined (no object of that size) is left out.
    """

    def __init__(self, classes: Sequence[str], *, masks: bool) -> None:
        self.classes = tuple(classes)
        self.kinds: tuple[Kind, ...] = ("bbox", "segm") if masks else ("bbox",)

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective: every rank's images are gathered, and the first rank measures."""
        figures: dict[str, float] = {}
        details: dict[str, Any] = {}
        for name in names:
            truth, detections = self._gathered(predict, sweep(name))
            measured, per_class = ranks.from_first(functools.partial(self._measured, truth, detections))
            figures |= {f"{name}/{key}": value for key, value in measured.items()}
            details[f"{name}/coco"] = {"classes": list(self.classes), **per_class}
        return Measured(figures, details)

    def _gathered(self, predict: Predict, batches: Iterable[Batch]) -> tuple[dict[int, Truth], list[Annotation]]:
        """Objects by image id, and all detections, in order of image id."""
        images_here: list[tuple[int, Truth, list[Annotation]]] = []
        for batch in batches:
            predictions = predict(batch)
            for i, results in stored_detections(predictions, batch).items():
                assert batch.instances is not None
                number, instances = int(batch.ids[i]), batch.instances[i]
                size = (0, 0) if instances.view is None else instances.view.source
                truth = Truth(size, annotations_of(instances, number))
                images_here.append((number, truth, [{"image_id": number, **result} for result in results]))
        parts = ranks.gather(images_here)
        images = sorted((image for part in parts for image in part), key=lambda image: image[0])
        return {number: truth for number, truth, _ in images}, [d for _, _, detections in images for d in detections]

    def _measured(
        self, truth: Mapping[int, Truth], detections: Sequence[Annotation]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        figures: dict[str, float] = {}
        per_class: dict[str, Any] = {}
        for kind in self.kinds:
            stats, of_classes = coco_figures(truth, detections, len(self.classes), kind)
            label = "box" if kind == "bbox" else "mask"
            figures |= {f"{label}_{key}": value for key, value in stats.items()}
            per_class[f"{label}_ap"] = of_classes
        return figures, per_class


def coco_figures(
    truth: Mapping[int, Truth], detections: Sequence[Annotation], num_classes: int, kind: Kind
) -> tuple[dict[str, float], list[float | None]]:
    """Those of COCO's twelve figures that are defined, and each class's AP (None: undefined).

    Args:
        truth: objects of each image, as COCO's annotations; images without objects are listed too.
        detections: as COCO's results; those of one image best first, or ties may be broken differently.
        num_classes: categories are numbered from 0.
    """
    evaluation = _evaluated(truth, detections, num_classes, kind, MAX_DETECTIONS)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    stats = dict(zip((*FIGURES, *RECALLS), (float(v) for v in evaluation.stats[:12]), strict=True))
    precision = torch.from_numpy(evaluation.eval["precision"][:, :, :, 0, -1])  # [thresholds, recalls, classes]
    of_classes: list[float | None] = []
    for number in range(num_classes):
        defined = precision[:, :, number][precision[:, :, number] > -1]
        of_classes.append(defined.mean().item() if len(defined) else None)
    return {key: value for key, value in stats.items() if value > -1}, of_classes


def proposal_recalls(truth: Mapping[int, Truth], masks: Sequence[Annotation]) -> dict[str, float]:
    """COCO's class-agnostic average recall at 1000 masks an image, over IoU thresholds .5 to .95: `ar1000` and, where
    there are such objects, `ar1000_small`, `ar1000_medium` and `ar1000_large`.

    Args:
        truth: objects of each image, as COCO's annotations.
        masks: as COCO's results; of an image with more, the 1000 with the highest score count.
    """
    objects = {number: Truth(image.size, _of_one_class(image.objects)) for number, image in truth.items()}
    evaluation = _evaluated(objects, _of_one_class(masks), 1, "segm", (1, 10, MAX_PROPOSALS))
    recall = evaluation.eval["recall"]  # [thresholds, 1, areas, 3]
    names = ("ar1000", "ar1000_small", "ar1000_medium", "ar1000_large")
    means = {name: float(recall[:, 0, area, -1].mean()) for area, name in enumerate(names)}
    return {name: mean for name, mean in means.items() if mean >= 0}  # -1: no object of that size


def _of_one_class(annotations: Sequence[Annotation]) -> list[Annotation]:
    return [{**annotation, "category_id": 0} for annotation in annotations]


def _evaluated(
    truth: Mapping[int, Truth], detections: Sequence[Annotation], num_classes: int, kind: Kind, most: Sequence[int]
) -> Any:
    """COCO's evaluation without its summary, which knows `MAX_DETECTIONS` only."""
    from faster_coco_eval import COCO, COCOeval_faster

    objects = itertools.chain.from_iterable(image.objects for image in truth.values())
    annotations = [{**annotation, "id": i} for i, annotation in enumerate(objects, start=1)]
    coco = COCO(
        {
            "images": [{"id": i, "height": t.size[0], "width": t.size[1]} for i, t in truth.items()],
            "annotations": annotations,
            "categories": [{"id": number, "name": str(number)} for number in range(num_classes)],
        }
    )
    results = COCO({"images": coco.dataset["images"], "annotations": [], "categories": coco.dataset["categories"]})
    if detections:
        results = coco.loadRes([dict(annotation) for annotation in detections])
    evaluation = COCOeval_faster(coco, results, kind, print_function=lambda *_: None)
    evaluation.params.maxDets = list(most)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def stored_detections(predictions: Predictions, batch: Batch) -> dict[int, list[Annotation]]:
    """The detections in each present image (by its index in the batch), as COCO's results without `image_id`.

    Boxes are [x, y, width, height] and masks compressed run lengths, in pixels of the stored image.
    """
    assert batch.instances is not None
    detections: dict[int, list[Annotation]] = {}
    for i in (batch.weight > 0).nonzero().flatten().tolist():
        view = batch.instances[i].view
        count = int(predictions["counts"][i])
        boxes = predictions["boxes"][i, :count].float().cpu()
        if view is not None:
            boxes = view.stored(boxes)
        corners = boxes.double()
        sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        scores = predictions["scores"][i, :count].double().tolist()
        classes = predictions["classes"][i, :count].tolist()
        results = [
            {"category_id": c, "bbox": box, "score": s} for c, box, s in zip(classes, sides, scores, strict=True)
        ]
        if "masks" in predictions and count:
            assert view is not None
            pasted = paste_masks(predictions["masks"][i, :count].float().cpu(), boxes, view.source)
            for result, mask in zip(results, encode_masks(pasted), strict=True):
                result["segmentation"] = mask
        detections[i] = results
    return detections


def readable(result: Annotation) -> Annotation:
    """A COCO result that can be written as JSON: a mask's run lengths as text."""
    mask = result.get("segmentation")
    if mask is None:
        return result
    text = {"size": [int(side) for side in mask["size"]], "counts": mask["counts"].decode("ascii")}
    return {**result, "segmentation": text}


def annotations_of(instances: Instances, image_id: int) -> list[Annotation]:
    """COCO annotations of an image's objects; their area is the annotated one or, without one, that of the mask."""
    from pycocotools import mask as coco_mask

    corners = instances.boxes.double()
    sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    areas = [float(coco_mask.area(dict(mask))) for mask in instances.masks]
    if instances.areas is not None:
        areas = instances.areas.tolist()
    objects: list[Annotation] = [
        {"image_id": image_id, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
        for box, label, crowd, area in zip(
            sides, instances.labels.tolist(), instances.crowd.tolist(), areas, strict=True
        )
    ]
    for annotation, mask in zip(objects, instances.masks, strict=False):  # no masks where only boxes are measured
        annotation["segmentation"] = dict(mask)
    return objects
