"""What runs cost, and that the ablation's runs cost what its table says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline import config as configs
from pipeline.config import validate
from pipeline.data.batch import Batch
from pipeline.models.text.tokenizer import CaptionTokenizer
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts, Stage
from pipeline.train.flops import flops_of_run, flops_per_sample

CAPTIONS = [
    "a red ring with rising stripes on a dark green background and two small things",
    "a picture of a blue square with dots before gray",
    "there is a star with rings, pink and small, in the middle",
    "there is a wheel with horizontal stripes, green and middle-sized, at the bottom",
]
"""The last has 27 tokens, as the longest of the demo's batches have on average: texts are encoded up to there."""
ABLATION = "configs/chains/flip_ablation.yaml"


def built(name: str, options: dict[str, Any]) -> Stage:
    torch.manual_seed(0)
    cls = stage_class(name)
    return cls(validate(cls.options_class, options, where="test"), DataFacts(("one", "two")))


def typical(stage: Stage, side: int) -> Batch:
    ids = torch.arange(len(CAPTIONS))
    images = torch.zeros(len(ids), 3, side, side, dtype=torch.uint8)
    text = stage.tokenizer(CAPTIONS) if hasattr(stage, "tokenizer") else None
    return Batch(ids, ids, torch.ones(len(ids)), 0, images=images, text=text, labels=ids % 2)


def test_the_captions_are_as_long_as_the_ablation_counts() -> None:
    tokenizer = CaptionTokenizer("clip", 32, 4096)
    assert int((tokenizer(CAPTIONS) != 0).sum(1).max()) == 27


def test_a_transformers_flops_are_those_of_the_formula() -> None:
    """Per token and block 24 W^2 in the projections and 4 T W in attention, thrice for forward and backward; the
    images get no gradient, so the patch embedding costs two thirds.
    """
    model = {"width": 64, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8}
    flops = flops_per_sample(stage := built("classify", {"model": model}), typical(stage, 32))
    tokens, width = 17, 64
    blocks = 3 * 3 * (tokens * 24 * width**2 + 4 * tokens**2 * width)
    patches = 2 * 2 * 16 * (8 * 8 * 3) * width
    head = 3 * 2 * width * 2
    assert flops == pytest.approx(blocks + patches + head, rel=1e-6)


def test_a_masked_run_costs_what_each_part_of_its_schedule_does() -> None:
    model = {"width": 64, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8}
    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 1, "vocab_size": 1000}

    def cost(ratio: Any, samples: int) -> float:
        options = {"model": model, "text": text, "mask_ratio": ratio}
        return flops_of_run(lambda: built("flip", options), typical(built("flip", options), 32), samples)

    schedule = [{"from_samples": 0, "ratio": 0.5}, {"from_samples": 300, "ratio": 0.0}]
    assert cost(schedule, 400) == pytest.approx(cost(0.5, 300) + cost(0.0, 100))
    assert cost(0.5, 100) < 0.65 * cost(0.0, 100)


def test_the_ablations_runs_cost_equally_or_see_equally_many_samples() -> None:
    chain = configs.load(ABLATION)
    costs: dict[str, float] = {}
    lengths: dict[str, int] = {}
    by_options: dict[str, float] = {}
    for name, step in chain["steps"].items():
        if step["kind"] != "train":
            continue
        document = configs.load(step["config"])
        changes = {key: value for key, value in step["set"].items() if key.startswith("options.")}
        options = document["options"] | {key.removeprefix("options."): value for key, value in changes.items()}
        lengths[name] = step["set"].get("length_samples", document["length_samples"])
        schedule = options.get("mask_ratio", 0.0)
        parts = schedule if isinstance(schedule, list) else [{"from_samples": 0, "ratio": schedule}]
        ends = [*(part["from_samples"] for part in parts[1:]), lengths[name]]
        costs[name] = 0.0
        for part, end in zip(parts, ends, strict=True):
            key = f"{document['stage']} {part['ratio']}"
            if key not in by_options:
                of_part = options | ({"mask_ratio": part["ratio"]} if "mask_ratio" in options else {})
                stage = built(document["stage"], of_part)
                by_options[key] = flops_per_sample(stage, typical(stage, 64))
            costs[name] += by_options[key] * (end - part["from_samples"])
    budget = costs["scratch_0"]
    assert costs["mae"] == pytest.approx(costs["mp3"], rel=0.01)
    for name, cost in costs.items():
        start = name.partition("_")[0]
        if name.endswith("_flops"):
            assert cost + costs.get(start, 0.0) == pytest.approx(budget, rel=0.01), name
        elif name not in ("mae", "mp3"):
            assert lengths[name] == lengths["scratch_0"]
    assert len(costs) == 9 + 8 + 2
