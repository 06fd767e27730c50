"""Segment Anything (Kirillov et al. 2023, arXiv 2304.02643): masks from prompts, which are points, boxes and masks.

Legend: I images, M prompts of all images, C channels, H W pixels of the model's input, h w places of its embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.models.detection.pyramid import ChannelNorm
from pipeline.models.sam.decoder import Attended, DecodedMasks, MaskDecoder
from pipeline.models.sam.prompts import PromptEncoder, Prompts
from pipeline.models.trunk.vit import ViT

MASK_THRESHOLD = 0.0  # logits above it belong to the object


class SamConfig(Config):
    """The parts on top of the trunk. The defaults are the paper's, for every size of trunk."""

    channels: int = Field(default=256, gt=0)  # of embeddings and tokens
    heads: int = Field(default=8, gt=0)  # of the mask decoder
    depth: int = Field(default=2, gt=0)
    mlp_width: int = Field(default=2048, gt=0)
    iou_width: int = Field(default=256, gt=0)  # hidden width of the IoU head
    mask_channels: int = Field(default=16, gt=0)  # of the convolutions that encode a mask
    norm_eps: float = Field(default=1e-5, gt=0)  # of the decoder's blocks; transformers' SAM has 1e-6

    @model_validator(mode="after")
    def _divisible(self) -> SamConfig:
        if self.channels % 8 or (self.channels // 2) % self.heads:
            raise ValueError(f"channels {self.channels} must be a multiple of 8 and of 2 x heads ({2 * self.heads})")
        if self.mask_channels % 4:
            raise ValueError(f"mask_channels {self.mask_channels} must be a multiple of 4")
        return self


class Embedded(NamedTuple):
    """Images as the encoder embeds them, once for any number of prompts."""

    features: Float[Tensor, "i c h w"]
    size: tuple[int, int]  # H, W of the input, padding included


def neck(width: int, channels: int) -> nn.Sequential:
    """From the trunk's patches, as a map, to the embedding."""
    return nn.Sequential(
        nn.Conv2d(width, channels, 1, bias=False),
        ChannelNorm(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        ChannelNorm(channels),
    )


class SegmentAnything:
    """A whole model. It holds no parameters itself: they belong to the stage that passes in the parts."""

    def __init__(self, trunk: ViT, neck: nn.Module, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder) -> None:
        self.trunk = trunk
        self.neck = neck
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.device

    def embed(self, pixels: Float[Tensor, "i 3 h w"], seeds: Tensor | None = None) -> Embedded:
        """Encode normalised images of any size that is a multiple of the patch size.

        The caller resizes images to fit the input, normalises, then pads with zeros below and at the right.
        """
        tokens = self.trunk(pixels, seeds=seeds)
        maps = tokens.patches.transpose(1, 2).unflatten(2, tokens.grid)
        return Embedded(self.neck(maps), (pixels.shape[2], pixels.shape[3]))

    def decode(self, embedded: Embedded, prompts: Prompts, which: slice = slice(None)) -> DecodedMasks:
        """Masks of each prompt, in fp32, by default all four; see `masks_for` for which to use."""
        attended = self.attend(embedded, prompts)
        return DecodedMasks(self.draw(embedded, attended, which), attended.iou[:, which].float())

    def attend(self, embedded: Embedded, prompts: Prompts) -> Attended:
        """The part of `decode` before masks are drawn."""
        features = embedded.features
        encoded = self.prompt_encoder(prompts, embedded.size)
        positions = self.prompt_encoder.pe_layer.grid((features.shape[2], features.shape[3]))
        return self.mask_decoder.attend(features, positions, encoded, prompts.image)

    def draw(self, embedded: Embedded, attended: Attended, which: slice = slice(None)) -> Tensor:
        """Logits of the masks, in fp32, from `attend`'s result."""
        size = (embedded.features.shape[2], embedded.features.shape[3])
        return self.mask_decoder.draw(attended, size, which).float()
