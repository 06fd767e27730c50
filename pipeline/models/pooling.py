"""From tokens to one vector per image."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.models.vit import Tokens

Pooling = Literal["cls", "avg", "avg_with_cls"]


def pool(tokens: Tokens, how: Pooling) -> Float[Tensor, "b d"]:
    """`cls`: the first prefix token. `avg`: mean over the patches, as MAE's fine-tuning. `avg_with_cls`: mean over
    prefix and patches, as FLIP's code.
    """
    if how == "cls":
        return tokens.prefix[:, 0]
    if how == "avg":
        return tokens.patches.mean(1)
    return torch.cat([tokens.prefix, tokens.patches], dim=1).mean(1)
