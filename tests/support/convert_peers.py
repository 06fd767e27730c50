"""Peers: other people's models, tiny and with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def shaken(model: nn.Module, seed: int = 0) -> Any:
    """Every parameter moved, so that none is zero, one or a fixed table's by accident; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("decoder_pos_embed", "position_embeddings")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Within 1e-5 of the largest magnitude in fp32, 1e-9 in float64."""
    tolerance = 1e-9 if theirs.dtype == torch.float64 else 1e-5
    assert ours.dtype == theirs.dtype
    return float((ours - theirs).detach().abs().max()) <= tolerance * float(theirs.detach().abs().max())


def pixels(height: int, width: int, dtype: torch.dtype = torch.float32, count: int = 2) -> Tensor:
    """Random normalised images [count,3,height,width]."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)
