"""Settings for all tests: the CPU as accelerator, one thread a process, and shapes checked at run time.

Every shape annotation in `pipeline` is checked while the tests run: jaxtyping's import hook wraps its functions and
dataclasses, so the hook has to stand here, before anything imports the package.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

import tests.support.shape_checks  # noqa: F401 -- the hook only looks it up

install_import_hook("pipeline", "tests.support.shape_checks.check")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder of optional data (real photos): $VITRAIL_SHARED, or `shared` beside the repository; skips if absent."""
    folder = Path(os.environ.get("VITRAIL_SHARED", REPOSITORY.parent / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip("no optional data: set VITRAIL_SHARED to a folder that holds data/coco_sample")
    return folder


@pytest.fixture(scope="session")
def photos(shared: Path) -> Path:
    """The table of 100 real photos with captions, `pairs.csv`, with its images beside it."""
    table = shared / "data" / "coco_sample" / "pairs.csv"
    if not table.is_file():
        pytest.skip("no photos: VITRAIL_SHARED holds no data/coco_sample/pairs.csv")
    return table
