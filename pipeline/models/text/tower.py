"""The text tower; options make it CLIP's, SigLIP's or FLIP's.

Legend: B texts, L tokens of a context, T tokens that are encoded, W width, E width of an embedding.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.models.noise import uniform
from pipeline.models.text.tokenizer import BYTE_PAIRS, SMALLEST_VOCAB, VOCAB_SIZE, CaptionTokenizer, Vocabulary
from pipeline.models.trunk.block import Block
from pipeline.models.trunk.config import Gelu

TextPooling = Literal["eot", "first", "last", "cls"]
TextMasking = Literal["random", "padding_first"]


class TextConfig(Config):
    """Shape of the text tower; the defaults are CLIP's for B/16."""

    tokenizer: str = BYTE_PAIRS  # or a vocab.txt or tokenizer.json; see CaptionTokenizer
    vocab_size: int | None = Field(default=None, gt=0)  # rows of the embedding; None: as many as the tokenizer has
    context_length: int = Field(default=77, ge=3)  # tokens, including start and end; longer captions are cut
    width: int = Field(default=512, gt=0)
    heads: int = Field(default=8, gt=0)
    layers: int = Field(default=12, gt=0)
    mlp_width: int | None = Field(default=None, gt=0)  # None: 4 x width
    causal: bool = True  # tokens attend only to those before them
    pooling: TextPooling = "eot"  # eot: the end token; first, last: of the context; cls: a learned token at the end
    mask_padding: bool = False  # don't attend to padding; always so with pooling cls
    projection: Literal["linear", "linear_bias", "none"] = "linear"
    gelu: Gelu = "erf"
    norm_eps: float = Field(default=1e-5, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.tokenizer == BYTE_PAIRS and not SMALLEST_VOCAB <= (self.vocab_size or VOCAB_SIZE) <= VOCAB_SIZE:
            raise ValueError(f"vocab_size of tokenizer clip must be {SMALLEST_VOCAB} to {VOCAB_SIZE}")
        if self.causal and self.pooling == "first":
            raise ValueError("with pooling first, causal must be false: the first token would attend to nothing else")
        if self.mask_padding and self.causal:
            raise ValueError("mask_padding needs causal: false (a causal tower's end token never attends to padding)")
        return self

    def build_tokenizer(self) -> CaptionTokenizer:
        """The tokenizer that goes with the tower."""
        return CaptionTokenizer(self.tokenizer, self.context_length, self.vocab_size)


class TextTower(nn.Module):
    """Transformer over tokens; the embedding is one token's output after the final norm, projected.

    Parameters: `token_embedding`, `pos_embed` [L(+1),W], `cls_token` [W] with pooling cls, `blocks.i` as the trunk's,
    `norm`, `projection`. Initialised as open_clip's.

    Args:
        config: its shape.
        embed_dim: E.
        vocabulary: of the tokenizer.

    Raises:
        ValueError: the vocabulary has more tokens than the embedding has rows, or no end token for pooling eot.
    """

    def __init__(self, config: TextConfig, embed_dim: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        rows = config.vocab_size or vocabulary.size
        if rows < vocabulary.size:
            raise ValueError(f"the tokenizer has {vocabulary.size} tokens, but text.vocab_size is only {rows}")
        if config.pooling == "eot" and vocabulary.end is None:
            raise ValueError("pooling eot needs a tokenizer with an end token; this one has none: use first or last")
        width = config.width
        self.token_embedding = nn.Embedding(rows, width)
        with_cls = config.pooling == "cls"
        self.pos_embed = nn.Parameter(torch.empty(config.context_length + with_cls, width))
        self.cls_token = nn.Parameter(torch.empty(width)) if with_cls else None
        mlp_width = config.mlp_width or 4 * width
        self.blocks = nn.ModuleList(
            TextBlock(width, config.heads, mlp_width, config.norm_eps, config.gelu) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.projection: nn.Linear | None = None
        if config.projection != "none":
            self.projection = nn.Linear(width, embed_dim, bias=config.projection == "linear_bias")
        self._initialize()

    def forward(self, text: Int[Tensor, "b l"], keep: Int[Tensor, "b t"] | None = None) -> Float[Tensor, "b e"]:
        """Embeddings, not normalised.

        Args:
            text: token numbers.
            keep: encode only the tokens at these places, in ascending order, each with the position it has in the text;
                the pooled token must be among them (see `text_masking`).
        """
        text, place, keep = self._trimmed(text, keep)
        x = self.token_embedding(text)
        x = x + (self.pos_embed[: text.shape[1]] if keep is None else self.pos_embed[keep])
        hidden = text == self.vocabulary.padding if self.config.mask_padding or self.cls_token is not None else None
        if self.cls_token is not None:
            x = torch.cat([x, (self.cls_token + self.pos_embed[-1]).expand(len(x), 1, -1)], dim=1)
            assert hidden is not None
            hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)
        mask = self._mask(x, hidden)
        for block in self.blocks:
            x = block(x, mask=mask)
        x = self.norm(x[torch.arange(len(x), device=x.device), place])
        embedding: Tensor = x if self.projection is None else self.projection(x)
        return embedding

    def pooled_place(self, text: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """Place of the pooled token in the text; the text's length with pooling cls, whose token comes after it."""
        how = self.config.pooling
        if how == "eot":
            return text.eq(self.vocabulary.end or 0).to(torch.int8).argmax(1)
        return torch.full((len(text),), {"first": 0, "last": text.shape[1] - 1, "cls": text.shape[1]}[how])

    def text_masking(
        self, text: Int[Tensor, "b l"], seeds: Int[Tensor, " b"], ratio: float, how: TextMasking
    ) -> Int[Tensor, "b t"]:
        """Places of the int(L (1 - ratio)) tokens that stay, ascending (FLIP, section 4.1): random ones, or with
        `padding_first` random ones once all padding is masked. The pooled token always stays.
        """
        length = text.shape[1]
        noise = uniform(seeds, "text_mask", length).to(text.device)
        if how == "padding_first":
            noise = noise + (text == self.vocabulary.padding)
        if self.config.pooling != "cls":
            noise.scatter_(1, self.pooled_place(text).to(text.device).unsqueeze(1), -1.0)
        places = torch.argsort(noise, dim=1, stable=True)[:, : int(length * (1 - ratio))]
        return torch.sort(places, dim=1).values

    def _trimmed(self, text: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens that are encoded, the index of the pooled one among them, and their places.

        In a causal tower, tokens after the batch's last end token can't affect the embedding, so they are left out:
        most captions are much shorter than the context.
        """
        place = self.pooled_place(text).to(text.device)
        if keep is not None:
            if self.config.pooling != "cls":
                place = (keep == place.unsqueeze(1)).to(torch.int8).argmax(1)
            else:
                place = torch.full_like(place, keep.shape[1])
            text = text.gather(1, keep)
        if self.config.causal and self.config.pooling == "eot":
            longest = int(place.max()) + 1
            text, keep = text[:, :longest], None if keep is None else keep[:, :longest]
        return text, place, keep

    def _mask(self, x: Tensor, hidden: Tensor | None) -> Tensor | None:
        """The mask added to the attention scores; None where all tokens attend to all."""
        mask = None
        if self.config.causal:
            mask = x.new_full((x.shape[1], x.shape[1]), float("-inf")).triu_(1)
        if hidden is not None:
            padding = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask

    def _initialize(self) -> None:
        """As open_clip's text tower."""
        width = self.config.width
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.01)
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=width**-0.5 * (2 * self.config.layers) ** -0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=width**-0.5 * (2 * self.config.layers) ** -0.5)
            for bias in (block.attn.qkv.bias, block.attn.proj.bias, block.mlp.fc1.bias, block.mlp.fc2.bias):
                nn.init.zeros_(bias)
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=width**-0.5)
            if self.projection.bias is not None:
                nn.init.zeros_(self.projection.bias)


class TextBlock(Block):
    """The trunk's block, with a mask on the attention."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b t d"], mask: Float[Tensor, "..."] | None = None
    ) -> Float[Tensor, "b t d"]:
        """One block; `mask` is `attend`'s."""
        x = x + self.attn(self.norm1(x), mask=mask)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
