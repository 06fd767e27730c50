"""COCO figures equal pycocotools' own, and come out alike wherever detections were made."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.data.batch import Batch, Instances
from pipeline.data.images.views import View, fitted
from pipeline.evaluate.base import Predictions
from pipeline.evaluate.coco import FIGURES, RECALLS, CocoEvaluation, Truth, coco_figures, proposal_recalls

HEIGHT, WIDTH, NUM_CLASSES = 200, 260, 5
Annotation = dict[str, Any]


def rle(box: list[float], *, hole: bool = False) -> Annotation:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    x, y, w, h = (round(v) for v in box)
    pixels[max(y, 0) : y + h, max(x, 0) : x + w] = 1
    if hole:
        pixels[y + h // 3 : y + h // 2, x : x + w] = 0
    return dict(coco_mask.encode(pixels))


def scene(seed: int, num_images: int = 40) -> tuple[dict[int, Truth], list[Annotation]]:
    """Objects of all sizes, crowds, empty images, images with over a hundred detections, many equal scores."""
    draw = np.random.default_rng(seed)
    truth: dict[int, Truth] = {}
    detections: list[Annotation] = []
    for number in range(num_images):
        objects, predicted = [], []
        for _ in range(0 if number % 7 == 0 else int(draw.integers(1, 9))):
            w, h = np.exp(draw.uniform(np.log(6), np.log(180), 2))
            box = [float(v) for v in (draw.uniform(0, WIDTH - w), draw.uniform(0, HEIGHT - h), w, h)]
            label = int(draw.integers(NUM_CLASSES - 1))  # one class has no object
            mask = rle(box, hole=draw.random() < 0.4)
            objects.append(
                {"image_id": number, "category_id": label, "bbox": box, "segmentation": mask,
                 "area": float(coco_mask.area(mask)), "iscrowd": int(draw.random() < 0.15)}
            )  # fmt: skip
            for _ in range(int(draw.integers(0, 4))):
                moved = [max(1.0, float(v + draw.normal(0, 3))) for v in box]
                kind = label if draw.random() < 0.8 else int(draw.integers(NUM_CLASSES))
                predicted.append((kind, moved, round(float(draw.random()), 1)))
        for _ in range(130 if number % 11 == 1 else 5):
            box = [float(v) for v in (*draw.uniform(0, 150, 2), *draw.uniform(4, 80, 2))]
            predicted.append((int(draw.integers(NUM_CLASSES)), box, round(float(draw.random() * 0.6), 1)))
        truth[number] = Truth((HEIGHT, WIDTH), objects)
        detections += [
            {"image_id": number, "category_id": kind, "bbox": box, "score": score, "segmentation": rle(box)}
            for kind, box, score in predicted
        ]
    return truth, detections


def pycocotools(truth: dict[int, Truth], detections: list[Annotation], kind: str) -> list[float]:
    objects = [annotation for image in truth.values() for annotation in image.objects]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number, "height": HEIGHT, "width": WIDTH} for number in truth],
        "annotations": [{**annotation, "id": i} for i, annotation in enumerate(objects, start=1)],
        "categories": [{"id": number} for number in range(NUM_CLASSES)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        results = [copy.deepcopy(annotation) for annotation in detections]
        if kind == "bbox":
            results = [{k: v for k, v in annotation.items() if k != "segmentation"} for annotation in results]
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_twelve_figures_equal_pycocotools(kind: str, seed: int) -> None:
    truth, detections = scene(seed)
    expected = pycocotools(truth, detections, kind)
    figures, per_class = coco_figures(truth, detections, NUM_CLASSES, kind)
    names = (*FIGURES, *RECALLS)
    assert all(value > 0 for value in expected), "a figure that is 0 or undefined compares nothing"
    for name, value in zip(names, expected, strict=True):
        assert abs(figures[name] - value) <= 1e-6, name
    defined = [value for value in per_class if value is not None]
    assert per_class[-1] is None
    assert np.mean(defined) == pytest.approx(figures["ap"], abs=1e-9)


def test_sizes_without_objects_have_no_figure() -> None:
    box = [10.0, 10.0, 50.0, 50.0]
    annotation = {"image_id": 0, "category_id": 0, "bbox": box, "segmentation": rle(box), "area": 2500.0, "iscrowd": 0}
    truth = {0: Truth((HEIGHT, WIDTH), [annotation]), 3: Truth((HEIGHT, WIDTH), [])}
    figures, _ = coco_figures(truth, [{**annotation, "score": 0.5}], 1, "segm")
    assert figures["ap"] == figures["ap_medium"] == pytest.approx(1.0)
    assert not {"ap_small", "ap_large"} & figures.keys()


def test_nothing_found_is_zero_and_nothing_there_no_figure() -> None:
    box = [10.0, 10.0, 50.0, 50.0]
    annotation = {"image_id": 0, "category_id": 0, "bbox": box, "segmentation": rle(box), "area": 2500.0, "iscrowd": 0}
    figures, _ = coco_figures({0: Truth((HEIGHT, WIDTH), [annotation])}, [], 1, "bbox")
    assert figures["ap"] == 0.0
    figures, _ = coco_figures({0: Truth((HEIGHT, WIDTH), [])}, [{**annotation, "score": 0.5}], 1, "bbox")
    assert figures == {}


def shown(
    truth: dict[int, Truth], detections: list[Annotation], view: View, size: int
) -> tuple[list[Batch], list[Any]]:
    """Batches of `size`, the last padded, and what a stage would predict, in pixels of what it sees."""
    batches, predictions = [], []
    for start in range(0, len(truth), size):
        ids = [i if i in truth else -1 for i in range(start, start + size)]
        instances, boxes, scores, classes, counts = [], [], [], [], []
        for number in ids:
            objects = truth[number].objects if number >= 0 else []
            xywh = torch.tensor([annotation["bbox"] for annotation in objects], dtype=torch.float64).reshape(-1, 4)
            instances.append(
                Instances(
                    torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1).float(),
                    torch.tensor([annotation["category_id"] for annotation in objects], dtype=torch.int64),
                    tuple(annotation["segmentation"] for annotation in objects),
                    torch.tensor([annotation["iscrowd"] for annotation in objects], dtype=torch.int64),
                    view,
                )
            )
            of_image = [annotation for annotation in detections if annotation["image_id"] == number]
            counts.append(len(of_image))
            padded = of_image + [{"bbox": [0, 0, 0, 0], "score": 0, "category_id": 0}] * (150 - len(of_image))
            corners = torch.tensor([annotation["bbox"] for annotation in padded], dtype=torch.float32)
            corners[:, 2:] += corners[:, :2]
            boxes.append(view.shown(corners))
            scores.append(torch.tensor([float(annotation["score"]) for annotation in padded]))
            classes.append(torch.tensor([annotation["category_id"] for annotation in padded]))
        weight = torch.tensor([float(number >= 0) for number in ids])
        batches.append(Batch(torch.tensor(ids), torch.zeros(size).long(), weight, 0, instances=tuple(instances)))
        predictions.append(
            {"boxes": torch.stack(boxes), "scores": torch.stack(scores), "classes": torch.stack(classes),
             "counts": torch.tensor(counts)}
        )  # fmt: skip
    return batches, predictions


def test_an_evaluation_over_batches_equals_pycocotools_on_the_stored_images() -> None:
    """Detections come in pixels of enlarged, padded images."""
    truth, detections = scene(2, num_images=11)
    detections = [annotation for annotation in detections if annotation["image_id"] != 1]
    view = fitted(HEIGHT, WIDTH, (400, 400))
    batches, predictions = shown(truth, detections, view, 4)
    answers = {id(batch): answer for batch, answer in zip(batches, predictions, strict=True)}

    def predict(batch: Batch) -> Predictions:
        answer: Predictions = answers[id(batch)]
        return answer

    def sweep(name: str) -> Iterable[Batch]:
        return batches

    evaluation = CocoEvaluation([str(i) for i in range(NUM_CLASSES)], masks=False)
    measured = evaluation(predict, sweep, ("heldout",))
    clipped = [
        {**annotation, "bbox": [x, y, min(x + w, WIDTH) - x, min(y + h, HEIGHT) - y]}
        for annotation in detections
        for x, y, w, h in [annotation["bbox"]]
    ]
    expected = dict(zip((*FIGURES, *RECALLS), pycocotools(truth, clipped, "bbox"), strict=True))
    for name, value in expected.items():
        # Boxes went to another size and back in fp32, which moves an overlap across a threshold now and then.
        assert abs(measured[f"heldout/box_{name}"] - value) <= 1e-6, name
    assert len(measured.details["heldout/coco"]["box_ap"]) == NUM_CLASSES


def test_the_recall_of_a_thousand_masks_is_pycocotools() -> None:
    """Whatever the class; by the object's size; with more masks of an image than count."""
    truth, detections = scene(0, num_images=24)
    draw = np.random.default_rng(5)
    for _ in range(1100):
        box = [float(v) for v in (*draw.uniform(0, 150, 2), *draw.uniform(4, 80, 2))]
        detections.append(
            {"image_id": 1, "category_id": 0, "bbox": box, "score": draw.random(), "segmentation": rle(box)}
        )
    coco = COCO()
    objects = [annotation for image in truth.values() for annotation in image.objects]
    coco.dataset = {
        "images": [{"id": number, "height": HEIGHT, "width": WIDTH} for number in truth],
        "annotations": [{**annotation, "id": i, "category_id": 0} for i, annotation in enumerate(objects, start=1)],
        "categories": [{"id": 0}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        results = [
            {**{k: v for k, v in annotation.items() if k != "bbox"}, "category_id": 0} for annotation in detections
        ]
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "segm")
        evaluation.params.maxDets = [1, 10, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    expected = evaluation.eval["recall"][:, 0, :, -1].mean(0).tolist()
    figures = proposal_recalls(truth, results)
    assert list(figures) == ["ar1000", "ar1000_small", "ar1000_medium", "ar1000_large"]
    assert list(figures.values()) == pytest.approx(expected, abs=1e-9)
    assert min(expected) > 0.02
    fewer = proposal_recalls(truth, results[: len(results) - 1100])
    assert fewer["ar1000"] != figures["ar1000"], "masks beyond the first hundred count"
