"""Small Segment Anything models of ours and of other projects, with the same random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

SIDE, PATCH, CHANNELS, HEADS = 64, 8, 32, 2


def official_sam(seed: int = 0, side: int = SIDE) -> Sam:
    """The package's model with random weights, the zero-initialised tables among them."""
    torch.manual_seed(seed)
    grid = side // PATCH
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            patch_size=PATCH,
            embed_dim=32,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            out_chans=CHANNELS,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=CHANNELS, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=CHANNELS,
            transformer=TwoWayTransformer(depth=2, embedding_dim=CHANNELS, mlp_dim=48, num_heads=HEADS),
            iou_head_hidden_dim=40,
        ),
    )
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return sam.eval()


def save_official(sam: Sam, folder: Path) -> str:
    """Where the package's checkpoint of it is."""
    path = folder / "sam.pth"
    torch.save(sam.state_dict(), path)
    return str(path)


def hugging_face_config(decoder_eps: float = 1e-6) -> Any:
    """A small model's configuration."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

    return SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            window_size=3,
            global_attn_indexes=[1],
            output_channels=CHANNELS,
            num_pos_feats=CHANNELS // 2,
            mlp_dim=64,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=CHANNELS, image_size=SIDE, patch_size=PATCH),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=CHANNELS,
            num_attention_heads=HEADS,
            mlp_dim=48,
            iou_head_hidden_dim=40,
            layer_norm_eps=decoder_eps,
        ),
    )


def load_into_official(path: str, stage: Any) -> Sam:
    """The package's model of a stage's shape, with the checkpoint that was written of it."""
    model, sam = stage.options.model, stage.options.sam
    width, depth, mlp_width, heads = model.shape
    side, grid = model.image_hw[0], model.grid[0]
    made = Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            patch_size=model.patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_width / width,
            out_chans=sam.channels,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=model.window or 0,
            global_attn_indexes=tuple(range(depth)) if model.window is None else model.global_blocks,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=sam.channels,
            image_embedding_size=(grid, grid),
            input_image_size=(side, side),
            mask_in_chans=sam.mask_channels,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=sam.channels,
            transformer=TwoWayTransformer(
                depth=sam.depth, embedding_dim=sam.channels, mlp_dim=sam.mlp_width, num_heads=sam.heads
            ),
            iou_head_hidden_dim=sam.iou_width,
        ),
    )
    made.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return made.eval()
