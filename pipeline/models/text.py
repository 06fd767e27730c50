"""The text tower and its tokenizer: open_clip's, imported when first needed since that takes seconds.

Legend: B texts, L tokens, E width of an embedding.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Config

VOCAB_SIZE = 49408  # of CLIP's byte-pair encoding


class TextConfig(Config):
    """Shape of the text tower; CLIP's for B/16 by default."""

    context_length: int = Field(default=77, ge=3)  # tokens, start and end among them; longer captions are cut
    width: int = Field(default=512, gt=0)
    heads: int = Field(default=8, gt=0)
    layers: int = Field(default=12, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class TextTower(nn.Module):
    """CLIP's causal text transformer; the feature is the end token's, projected (Radford et al. 2021)."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        from open_clip.transformer import TextTransformer

        self.transformer = TextTransformer(
            context_length=config.context_length,
            vocab_size=VOCAB_SIZE,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=embed_dim,
        )

    def forward(self, text: Int[Tensor, "b l"]) -> Float[Tensor, "b e"]:
        """Embeddings, not normalised."""
        embedding: Tensor = self.transformer(text)
        return embedding


class ClipTokenizer:
    """Captions to token numbers, padded with 0 to `context_length`; cheap to pickle into loader workers."""

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Int[Tensor, "b l"]:
        """A caption longer than the context keeps its beginning and the end token; an empty one is start and end."""
        tokens: Tensor = _byte_pairs()(texts, context_length=self.context_length)
        return tokens

    def decode(self, tokens: Int[Tensor, " l"]) -> str:
        """The caption again, in lower case and with single spaces."""
        tokenizer = _byte_pairs()
        special = {0, tokenizer.sot_token_id, tokenizer.eot_token_id}
        text: str = tokenizer.decode([token for token in tokens.tolist() if token not in special])
        return text.strip()


@functools.cache
def _byte_pairs() -> Any:
    """open_clip's tokenizer. Its module needs nothing of the package around it, whose import costs a loader's worker
    seconds: where the package isn't loaded yet, the module is loaded by itself.
    """
    if "open_clip" in sys.modules:
        from open_clip.tokenizer import SimpleTokenizer

        return SimpleTokenizer()
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("pipeline.models._open_clip_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
