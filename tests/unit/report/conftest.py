"""Run directories as training leaves them, small and with known contents."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import yaml
from PIL import Image


class MakeRun(Protocol):
    def __call__(self, name: str, **facts: Any) -> str: ...


def png(side: int = 16, value: int = 128) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run directory and returns its path."""

    def make(
        name: str,
        *,
        stage: str = "mae",
        seed: int = 0,
        losses: Sequence[float] = (4.0, 3.0, 2.0, 1.0),
        evaluations: Sequence[Mapping[str, float]] = (),
        details: Mapping[str, Any] | None = None,
        pictures: Sequence[str] = (),
        status: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> str:
        folder = tmp_path / "runs" / name
        (folder / "evaluations").mkdir(parents=True)
        steps = len(losses)
        facts = {
            "state": "done", "stage": stage, "step": steps, "samples": steps * 256, "length_samples": steps * 256,
            "attempt": 1, "world_size": 2, "zero_stage": 2, "precision": "bf16", "num_parameters": 5_500_000,
            "weights_sha256": "ab" * 32,
        }  # fmt: skip
        write(folder / "status.json", json.dumps({**facts, **(status or {})}))
        written = {"name": name, "stage": stage, "seed": seed, "data": {"train": "data/train", "global_batch": 256}}
        write(folder / "config.yaml", yaml.safe_dump({**written, **(config or {})}))
        write(folder / "resolved.yaml", yaml.safe_dump({"world_size": 2, "zero_stage": 2, "precision": "bf16"}))
        write(folder / "command.txt", f"vitrail train {name}.yaml\n")
        write(folder / "environment.json", json.dumps({"versions": {"torch": "2.15.0"}, "cpu": "a processor"}))
        lines: list[dict[str, Any]] = [
            {
                "kind": "train", "attempt": 1, "step": step, "samples": step * 256, "time": 1000.0 + step,
                "loss": loss, "lr": 0.001, "grad_norm": 1.0, "samples_per_s": 512.0, "data_wait_s": [0.01, 0.05],
                "step_s": 0.5,
            }
            for step, loss in enumerate(losses, start=1)
        ]  # fmt: skip
        for place, figures in enumerate(evaluations):
            step = steps - len(evaluations) + 1 + place
            lines.append(
                {
                    "kind": "evaluate", "attempt": 1, "step": step, "samples": step * 256, "time": 1010.0 + step,
                    "figures": dict(figures),
                }
            )  # fmt: skip
            document = {"figures": dict(figures), "details": dict(details or {})}
            write(folder / "evaluations" / f"step-{step:09d}.json", json.dumps(document))
        write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if pictures:
            write_pictures(folder / "pictures" / f"step-{steps:09d}", pictures)
        return str(folder)

    return make


def write_pictures(folder: Path, titles: Sequence[str]) -> None:
    documents = []
    for number, title in enumerate(titles):
        panels = []
        for place, caption in enumerate(("original", "masked", "reconstructed")):
            name = f"{number:02d}-picture/{place}-{caption}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png(value=40 * place + number))
            panels.append({"caption": caption, "file": name})
        documents.append({"title": title, "panels": panels})
    write(folder / "pictures.json", json.dumps(documents))


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
