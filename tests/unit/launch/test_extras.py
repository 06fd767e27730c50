"""Libraries that only some commands need may be missing: the message says what to install."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from launch.extras import EXTRAS, missing_library
from tests.support import train_cases

WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


@pytest.mark.parametrize(
    ("library", "options", "extra"), [("ray", [], "ray"), ("deepspeed", ["--no-ray", "--ranks", "1"], "train")]
)
def test_what_is_missing_is_said_with_the_extra_that_brings_it(
    tmp_path: Path, library: str, options: list[str], extra: str
) -> None:
    train_cases.write_data(tmp_path)
    (tmp_path / "mae.yaml").write_text(yaml.safe_dump(train_cases.document(tmp_path, "mae")))
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(WITHOUT.format(names={library}))
    path = os.pathsep.join([str(tmp_path / "without"), str(train_cases.REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-m", "launch", "train", "mae.yaml", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"this needs {library}, which isn't installed. Fix: pip install 'vitrail[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_module_of_no_extra_stays_a_defect() -> None:
    assert missing_library(ModuleNotFoundError("No module named 'pipelin'", name="pipelin")) is None


def test_the_extras_named_are_those_of_the_package(repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)
    for library, extra in EXTRAS.items():
        assert any(line.startswith(library) for line in extras[extra]), library
