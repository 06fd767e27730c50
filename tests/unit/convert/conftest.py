"""Settings that all converters are tried in."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both precisions that peers run in."""
    precision: torch.dtype = request.param
    return precision
