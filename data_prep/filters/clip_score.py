"""A filter by how well a CLIP model finds that image and caption fit."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from data_prep.account import Refused
from data_prep.filters.candidate import Candidate
from data_prep.filters.options import FilterOptions


class ClipScoreFilter(FilterOptions):
    """Refuses pairs whose image and caption a CLIP model finds unlike (`score_too_low`).

    The score is the cosine similarity, between -1 and 1. Give either an open_clip model or a run of stage `flip`.
    """

    scorer: ClassVar[str | None] = "data_prep.filters.score:ClipScorer"

    type: Literal["clip_score"]
    min_score: float = Field(ge=-1, le=1)
    model: str | None = None  # open_clip's name, such as ViT-B-32
    pretrained: str | None = None  # open_clip's tag or a weights file; a model of a hub, such as hf-hub:..., needs none
    run: str | None = None  # run directory of stage flip, whose newest checkpoint is taken
    batch: int = Field(default=64, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where Ray has one

    @model_validator(mode="after")
    def _one_model(self) -> ClipScoreFilter:
        if (self.model is None) == (self.run is None):
            raise ValueError("give either model (with pretrained) or run")
        if self.model is not None and self.pretrained is None and ":" not in self.model:
            raise ValueError(f"{self.model} has no weights yet: give pretrained, open_clip's tag or a file")
        return self

    @property
    def wants_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def batch_size(self) -> int:
        return self.batch

    def judge(self, candidate: Candidate, score: float | None, number: int) -> Refused | dict[str, Any]:
        assert score is not None, "a model's filter needs its score"
        if not score >= self.min_score:  # also where it isn't a number
            return Refused("score_too_low", f"a score of {score:.4f}, below {self.min_score:g} (filter {number})")
        return {"clip_score": round(score, 4)}
