"""The mask decoder of Segment Anything (Kirillov et al. 2023, appendix A).

Legend: I images, M prompts of all images, T tokens (1 for the predicted IoU, K for masks, the prompt's), C channels,
N = h * w places of an image's embedding, y x = 4h 4w of a mask, K = 4 masks: number 0 for prompts of several points
or boxes, 1 to 3 for a single point or box.

Parameters are named as in the package segment-anything. All prompts of an image share its keys and values for as long
as these are the same for all prompts, which is through most of the first layer.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.sam.prompts import Encoded
from pipeline.models.trunk.attention import attend

NUM_MASKS = 4
MASKS_ONE_PROMPT = slice(1, NUM_MASKS)
MASKS_MORE_PROMPTS = slice(0, 1)


class DecodedMasks(NamedTuple):
    """The decoder's masks for each prompt."""

    logits: Float[Tensor, "m k y x"]
    iou: Float[Tensor, "m k"]  # predicted intersection over union of each mask with the object


class Attended(NamedTuple):
    """The decoder's state before masks are drawn."""

    tokens: Float[Tensor, "m k c"]  # of the masks
    places: Float[Tensor, "m n c"]
    iou: Float[Tensor, "m k"]


class TwoWayAttention(nn.Module):
    """Multi-head attention between two sets of tokens, at a width that may differ from theirs."""

    def __init__(self, channels: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, width)
        self.k_proj = nn.Linear(channels, width)
        self.v_proj = nn.Linear(channels, width)
        self.out_proj = nn.Linear(width, channels)

    def forward(
        self,
        q: Float[Tensor, "b t c"],
        k: Float[Tensor, "b2 s c"],
        v: Float[Tensor, "b2 s c"],
        *,
        q_image: Int[Tensor, " m"] | None = None,
        k_image: Int[Tensor, " m"] | None = None,
        mask: Float[Tensor, "m 1 1 s"] | None = None,
    ) -> Float[Tensor, "m t c"]:
        """Attend.

        Args:
            q_image, k_image: each prompt's image, where queries, or keys and values, have one entry per image instead
                of one per prompt. They are then projected only once for each image.
            mask: added to the scores, -inf for keys to ignore; None: all keys are used.
        """
        queries, keys = self._by_head(self.q_proj(q)), self._by_head(self.k_proj(k))
        values = self._by_head(self.v_proj(v))
        if q_image is not None:
            queries = of_prompts(queries, q_image)
        if k_image is not None:
            keys, values = of_prompts(keys, k_image), of_prompts(values, k_image)
        out = attend(queries, keys, values, mask)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


def of_prompts(x: Float[Tensor, "i *rest"], image: Int[Tensor, " m"]) -> Float[Tensor, "m *rest"]:
    """The entry of each prompt's image; not copied where there is only one image."""
    return x.expand(image.shape[0], *x.shape[1:]) if x.shape[0] == 1 else x[image]


class TwoWayMlp(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(channels, hidden)
        self.lin2 = nn.Linear(hidden, channels)

    def forward(self, x: Float[Tensor, "m t c"]) -> Float[Tensor, "m t c"]:
        """Apply to each token."""
        out: Tensor = self.lin2(F.relu(self.lin1(x)))
        return out


class TwoWayBlock(nn.Module):
    """Self-attention of tokens, attention from tokens to image, MLP, attention from image to tokens; post-norm."""

    def __init__(self, channels: int, heads: int, mlp_width: int, eps: float, *, first: bool) -> None:
        super().__init__()
        self.first = first  # here the tokens are their own positions, and self-attention has no residual
        self.self_attn = TwoWayAttention(channels, heads, channels)
        self.norm1 = nn.LayerNorm(channels, eps=eps)
        self.cross_attn_token_to_image = TwoWayAttention(channels, heads, channels // 2)
        self.norm2 = nn.LayerNorm(channels, eps=eps)
        self.mlp = TwoWayMlp(channels, mlp_width)
        self.norm3 = nn.LayerNorm(channels, eps=eps)
        self.norm4 = nn.LayerNorm(channels, eps=eps)
        self.cross_attn_image_to_token = TwoWayAttention(channels, heads, channels // 2)

    def forward(
        self,
        tokens: Float[Tensor, "m t c"],
        places: Float[Tensor, "b n c"],
        initial: Float[Tensor, "m t c"],
        positions: Float[Tensor, "n c"],
        image: Int[Tensor, " m"] | None,
        mask: Float[Tensor, "m 1 1 t"] | None,
    ) -> tuple[Float[Tensor, "m t c"], Float[Tensor, "m n c"]]:
        """One block.

        Args:
            initial: the tokens before the first block, which serve as their positions.
            image: each prompt's image, where `places` has one entry per image instead of one per prompt.
        """
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens, mask=mask)
        else:
            queries = tokens + initial
            tokens = tokens + self.self_attn(queries, queries, tokens, mask=mask)
        tokens = self.norm1(tokens)
        placed = places + positions
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + initial, placed, places, k_image=image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        update = self.cross_attn_image_to_token(placed, tokens + initial, tokens, q_image=image, mask=mask)
        if image is not None:
            places = of_prompts(places, image)
        return tokens, self.norm4(places + update)


class TwoWayTransformer(nn.Module):
    """Two-way blocks, then a final attention from tokens to image."""

    def __init__(self, channels: int, heads: int, depth: int, mlp_width: int, eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayBlock(channels, heads, mlp_width, eps, first=number == 0) for number in range(depth)
        )
        self.final_attn_token_to_image = TwoWayAttention(channels, heads, channels // 2)
        self.norm_final_attn = nn.LayerNorm(channels, eps=1e-5)

    def forward(
        self,
        initial: Float[Tensor, "m t c"],
        places: Float[Tensor, "b n c"],
        positions: Float[Tensor, "n c"],
        image: Int[Tensor, " m"] | None,
        mask: Float[Tensor, "m 1 1 t"] | None,
    ) -> tuple[Float[Tensor, "m t c"], Float[Tensor, "m n c"]]:
        """Tokens and places after all blocks; see `TwoWayBlock`."""
        tokens = initial
        for block in self.layers:
            tokens, places = block(tokens, places, initial, positions, image, mask)
            image = None
        update = self.final_attn_token_to_image(tokens + initial, places + positions, places, k_image=image)
        return self.norm_final_attn(tokens + update), places


class Upscale(nn.ConvTranspose2d):
    """A transposed convolution with stride = kernel = 2 on channels-last input, as one matrix product.

    The four output places of each input place stay in a separate dimension, row by row.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, 2, stride=2)

    def forward(self, x: Float[Tensor, "*n before"]) -> Float[Tensor, "*n 4 after"]:  # type: ignore[override]
        """Four output places for each input place."""
        weight = self.weight.permute(2, 3, 1, 0).reshape(-1, self.in_channels)
        assert self.bias is not None
        return F.linear(x, weight, self.bias.repeat(4)).view(*x.shape[:-1], 4, self.out_channels)


class ReluMlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, before: int, hidden: int, after: int, depth: int = 3) -> None:
        super().__init__()
        widths = [before, *[hidden] * (depth - 1), after]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Float[Tensor, "m before"]) -> Float[Tensor, "m after"]:
        """Apply to each row."""
        for number, layer in enumerate(self.layers):
            x = layer(F.relu(x) if number else x)
        return x


class MaskDecoder(nn.Module):
    """Masks and their predicted quality from an image's embedding and prompts."""

    def __init__(self, channels: int, heads: int, depth: int, mlp_width: int, iou_width: int, eps: float) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(channels, heads, depth, mlp_width, eps)
        self.iou_token = nn.Embedding(1, channels)
        self.mask_tokens = nn.Embedding(NUM_MASKS, channels)
        self.output_upscaling = nn.Sequential(
            Upscale(channels, channels // 4),
            nn.LayerNorm(channels // 4, eps=1e-6),
            nn.GELU(),
            Upscale(channels // 4, channels // 8),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            ReluMlp(channels, channels, channels // 8) for _ in range(NUM_MASKS)
        )
        self.iou_prediction_head = ReluMlp(channels, iou_width, NUM_MASKS)

    def forward(
        self,
        features: Float[Tensor, "i c h w"],
        positions: Float[Tensor, "n c"],
        encoded: Encoded,
        image: Int[Tensor, " m"],
    ) -> DecodedMasks:
        """All four masks of each prompt, as logits at four times the embedding's size, and their predicted IoU.

        Args:
            features: of the images.
            positions: of an embedding's places.
            image: each prompt's image.
        """
        attended = self.attend(features, positions, encoded, image)
        return DecodedMasks(self.draw(attended, (features.shape[2], features.shape[3])), attended.iou)

    def attend(
        self, features: Float[Tensor, "i c h w"], positions: Float[Tensor, "n c"], encoded: Encoded, image: Tensor
    ) -> Attended:
        """Everything except drawing the masks, so that masks with a low `Attended.iou` need not be drawn."""
        output_tokens = self._output_tokens(image.device)
        tokens = torch.cat([output_tokens.expand(image.shape[0], -1, -1), encoded.sparse], dim=1)
        mask: Tensor | None = None
        if encoded.present is not None:
            mask = torch.zeros_like(encoded.sparse[..., 0]).masked_fill(~encoded.present, float("-inf"))
            mask = F.pad(mask, (output_tokens.shape[0], 0))[:, None, None]
        places = features.flatten(2).transpose(1, 2)
        dense = encoded.dense.flatten(2).transpose(1, 2)
        owner: Tensor | None = image
        if dense.shape[1] > 1 or dense.shape[0] > 1:  # some prompt has a mask: prompts share nothing
            places, owner = of_prompts(places, image), None
        tokens, places = self.transformer(tokens, places + dense, positions.to(places.dtype), owner, mask)
        return Attended(tokens[:, 1 : 1 + NUM_MASKS], places, self.iou_prediction_head(tokens[:, 0]))

    def draw(self, attended: Attended, size: tuple[int, int], which: slice = slice(None)) -> Float[Tensor, "m k y x"]:
        """Logits of the masks, by default of all four."""
        numbers = range(NUM_MASKS)[which]
        mixes = torch.stack([self.output_hypernetworks_mlps[i](attended.tokens[:, i]) for i in numbers], dim=1)
        upscaled = self.output_upscaling(attended.places).flatten(1, 3)  # [M, N*4*4, C/8]
        masks: Tensor = (mixes @ upscaled.transpose(1, 2)).view(mixes.shape[0], len(numbers), *size, 2, 2, 2, 2)
        # rows are (place, first doubling, second doubling), and so are columns
        return masks.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(masks.shape[0], len(numbers), 4 * size[0], 4 * size[1])

    def _output_tokens(self, device: torch.device) -> Float[Tensor, "t c"]:
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        return torch.cat([self.iou_token(zero), self.mask_tokens(torch.arange(NUM_MASKS, device=device))])
