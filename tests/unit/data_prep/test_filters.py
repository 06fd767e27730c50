"""Filters: a user's function, and CLIP scores of open_clip's models and our own, in this process and as actors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data_prep.build import build
from data_prep.filters.candidate import Candidate
from data_prep.filters.clip_score import ClipScoreFilter
from data_prep.partitions import scorer_share
from pipeline.config import validate
from pipeline.data.batch import RawSample
from pipeline.errors import ConfigError
from pipeline.inference.loading import load
from pipeline.stages.base import DataFacts
from pipeline.stages.flip import FlipStage
from tests.support.prep_cases import samples, settings, sidecar, write_pairs
from tests.support.saved_run import save_checkpoint

MODEL = "ViT-S-32-alt"  # open_clip's smallest


def not_seven(candidate: Candidate) -> bool | str:
    assert candidate.pixels().ndim == 3
    return "it is seven" if candidate.caption.endswith("7") else not candidate.caption.endswith("8")


def broken(candidate: Candidate) -> bool:
    raise KeyError(candidate.caption)


def vague(candidate: Candidate) -> Any:
    return None


def test_a_users_function_says_what_it_does_not_want(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 20)
    filters = [{"type": "function", "name": f"{__name__}.not_seven"}]
    report = build(settings(table, tmp_path / "out", filters=filters))
    assert report.filtered == {"function_refused": 4}
    messages = sorted(row["error_message"] for row in sidecar(tmp_path / "out" / "train") if row["reason"])
    assert messages == [f"{__name__}.not_seven"] * 2 + [f"{__name__}.not_seven: it is seven"] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("broken", "raised KeyError"), ("vague", "returned None"), ("missing", "can't import")],
)
def test_a_function_that_is_wrong_stops_the_build_and_is_named(tmp_path: Path, name: str, message: str) -> None:
    table = write_pairs(tmp_path / "raw", 4)
    filters = [{"type": "function", "name": f"{__name__}.{name}"}]
    with pytest.raises(ConfigError, match=message) as error:
        build(settings(table, tmp_path / "out", filters=filters))
    assert name in str(error.value)


def open_clip_scores(pairs: dict[str, dict[str, bytes]], weights: Path) -> dict[str, float]:
    """The scores by open_clip's own way of using a model."""
    import open_clip
    import torch

    model, _, transform = open_clip.create_model_and_transforms(MODEL, pretrained=str(weights))
    tokenize = open_clip.get_tokenizer(MODEL)
    scores = {}
    with torch.inference_mode():
        for key, members in pairs.items():
            image = model.eval().encode_image(transform(Image.open(io.BytesIO(stored(members))).convert("RGB"))[None])
            text = model.encode_text(tokenize([members["txt"].decode()]))
            scores[key] = float(torch.cosine_similarity(image, text))
    return scores


def stored(members: dict[str, bytes]) -> bytes:
    return next(members[extension] for extension in ("jpg", "png", "webp") if extension in members)


@pytest.fixture(scope="module", name="weights")
def open_clip_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights for `MODEL`. Untrained ones do: it is the scores' way that is tested."""
    import open_clip
    import torch

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(open_clip.create_model(MODEL).state_dict(), path)
    return path


@pytest.mark.slow
def test_scores_are_open_clips_and_the_threshold_is_kept(weights: Path, tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 9)
    build(settings(table, tmp_path / "all"))
    expected = open_clip_scores(samples(tmp_path / "all" / "train"), weights)
    limit = float(np.mean(sorted(expected.values())[4:6]))  # between two scores: batches round otherwise than singles
    filters = [{"type": "clip_score", "model": MODEL, "pretrained": str(weights), "min_score": limit, "batch": 4}]
    report = build(settings(table, tmp_path / "out", filters=filters))
    passed = samples(tmp_path / "out" / "train")
    assert set(passed) == {key for key, score in expected.items() if score >= limit}
    assert report.filtered == {"score_too_low": 5}
    for key, members in passed.items():
        assert json.loads(members["json"])["clip_score"] == pytest.approx(expected[key], abs=2e-4)


FLIP = {
    "model": {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8},
    "text": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    "embed_dim": 16,
}


@pytest.fixture(scope="module", name="flip_run")
def run_of_flip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of stage flip with one checkpoint."""
    import torch

    torch.manual_seed(1)
    stage = FlipStage(validate(FlipStage.options_class, FLIP, where="test"), DataFacts())
    folder = tmp_path_factory.mktemp("flip")
    (folder / "config.yaml").write_text(yaml.safe_dump({"stage": "flip", "options": FLIP}))
    (folder / "status.json").write_text("{}")
    save_checkpoint(str(folder / "checkpoints"), {name: value.detach() for name, value in stage.state_dict().items()})
    return folder


def flip_scores(pairs: dict[str, dict[str, bytes]], run: Path) -> dict[str, float]:
    """Cosines of what the checkpoint's stage embeds, one pair at a time."""
    import torch

    stage: Any = load(str(run)).stage
    transform = stage.transform(train=False)
    scores = {}
    with torch.inference_mode():
        for number, (key, members) in enumerate(pairs.items()):
            example = transform(RawSample(number, key, members), 0)
            image, text = stage.embed_images(example.image[None]), stage.embed_texts(example.text[None])
            scores[key] = float(torch.cosine_similarity(image, text))
    return scores


def test_our_own_flip_run_scores(flip_run: Path, tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 9)
    filters = [{"type": "clip_score", "run": str(flip_run), "min_score": -1.0, "batch": 4}]
    build(settings(table, tmp_path / "out", filters=filters))
    pairs = samples(tmp_path / "out" / "train")
    expected = flip_scores(pairs, flip_run)
    assert len(set(expected.values())) == len(pairs) == 9
    for key, members in pairs.items():
        assert json.loads(members["json"])["clip_score"] == pytest.approx(expected[key], abs=2e-4)
    with pytest.raises(ConfigError, match="no run of stage flip"):
        build(settings(table, tmp_path / "bad", filters=[filters[0] | {"run": str(tmp_path)}]))


@pytest.mark.slow
def test_models_run_as_actors_and_score_as_in_one_process(weights: Path, flip_run: Path, tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 24)
    filters: list[dict[str, Any]] = [
        {"type": "clip_score", "model": MODEL, "pretrained": str(weights), "min_score": -1.0, "batch": 3},
        {"type": "clip_score", "run": str(flip_run), "min_score": -1.0, "batch": 3},
    ]
    build(settings(table, tmp_path / "one", filters=filters))
    build(settings(table, tmp_path / "out", filters=filters, ray={"tasks": 2, "scorers": 2}))
    alone, in_actors = (samples(tmp_path / name / "train") for name in ("one", "out"))
    assert len(in_actors) == 24
    for key, members in in_actors.items():
        facts, before = json.loads(members["json"]), json.loads(alone[key]["json"])
        for name in ("clip_score", "clip_score_1"):
            assert facts[name] == pytest.approx(before[name], abs=2e-4)  # as torch's threads differ, so do last bits
    filters[0]["model"] = "ViT-nonsense"
    with pytest.raises(ConfigError, match="no model 'ViT-nonsense'"):
        build(settings(table, tmp_path / "bad", filters=filters, ray={"tasks": 2}))


@pytest.mark.parametrize(
    ("num_gpus", "num_filters", "wanted", "expected"),
    [
        (0, 2, None, (1, 0.0)),
        (0, 2, 3, (3, 0.0)),
        (8, 0, None, (1, 0.0)),
        (8, 1, None, (8, 1.0)),
        (8, 3, None, (2, 1.0)),
        (1, 1, None, (1, 1.0)),
        (1, 3, None, (1, 0.3333)),
        (2, 3, 2, (2, 0.3333)),
    ],
)
def test_scorers_of_all_filters_fit_on_the_gpus_at_once(
    num_gpus: float, num_filters: int, wanted: int | None, expected: tuple[int, float]
) -> None:
    each, share = scorer_share(num_gpus, num_filters, wanted)
    assert (each, share) == expected
    if share:
        assert -(-each * num_filters // int(1 / share)) <= num_gpus  # so many fit on one


def test_a_model_filter_names_one_model() -> None:
    with pytest.raises(ValueError, match="either model"):
        ClipScoreFilter(type="clip_score", min_score=0.1)
    with pytest.raises(ValueError, match="give pretrained"):
        ClipScoreFilter(type="clip_score", min_score=0.1, model=MODEL)
