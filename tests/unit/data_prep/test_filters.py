"""Filters: a user's function, and CLIP scores of open_clip's models, in this process and as actors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prep_cases import samples, settings, sidecar, write_pairs

from data_prep.build import build
from data_prep.config import ScoreFilter
from data_prep.filters import Candidate
from pipeline.errors import ConfigError

MODEL = "ViT-S-32-alt"  # open_clip's smallest; untrained weights do, since it is the scores' way that is tested


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


def open_clip_scores(found: dict[str, dict[str, bytes]]) -> dict[str, float]:
    """The scores by open_clip's own way of using a model."""
    import open_clip
    import torch

    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(MODEL)
    tokenize = open_clip.get_tokenizer(MODEL)
    scores = {}
    with torch.inference_mode():
        for key, members in found.items():
            data = next(members[e] for e in ("jpg", "png", "webp") if e in members)
            image = model.eval().encode_image(transform(Image.open(io.BytesIO(data)).convert("RGB"))[None])
            text = model.encode_text(tokenize([members["txt"].decode()]))
            scores[key] = float(torch.cosine_similarity(image, text))
    return scores


@pytest.mark.slow
def test_scores_are_open_clips_and_the_threshold_is_kept(tmp_path: Path) -> None:
    import torch

    table = write_pairs(tmp_path / "raw", 9)
    build(settings(table, tmp_path / "all"))
    expected = open_clip_scores(samples(tmp_path / "all" / "train"))
    limit = float(np.mean(sorted(expected.values())[4:6]))  # between two scores: batches round otherwise than singles
    torch.manual_seed(0)
    filters = [{"type": "clip_score", "model": MODEL, "min_score": limit, "batch": 4}]
    report = build(settings(table, tmp_path / "out", filters=filters))
    kept = samples(tmp_path / "out" / "train")
    assert set(kept) == {key for key, score in expected.items() if score >= limit}
    assert report.filtered == {"score_too_low": 5}
    for key, members in kept.items():
        assert json.loads(members["json"])["clip_score"] == pytest.approx(expected[key], abs=2e-4)


@pytest.mark.slow
def test_models_run_as_actors(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 24)
    filters = [{"type": "clip_score", "model": MODEL, "min_score": -1.0}]
    build(settings(table, tmp_path / "out", filters=filters, ray={"workers": 2, "scorers": 1}))
    assert all("clip_score" in json.loads(m["json"]) for m in samples(tmp_path / "out" / "train").values())
    filters[0]["model"] = "ViT-nonsense"
    with pytest.raises(ConfigError, match="no model 'ViT-nonsense'"):
        build(settings(table, tmp_path / "bad", filters=filters, ray={"workers": 2}))


def test_a_model_filter_names_one_model() -> None:
    with pytest.raises(ValueError, match="either model"):
        ScoreFilter(type="clip_score", min_score=0.1)
