"""Masked autoencoding (He et al. 2022, arXiv 2111.06377): encode a few patches, predict the pixels of the others.

Legend: B samples, N patches, M masked patches, D width, P pixel values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config import Config
from pipeline.data.batch import Batch
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.evaluate.mean import MeanEvaluation
from pipeline.losses.reconstruction import masked_mse, normalize_patches, patch_statistics
from pipeline.models.decoder import DecoderConfig, decoder
from pipeline.models.noise import uniform
from pipeline.models.pixels import denormalize, normalize, patchify, unpatchify
from pipeline.models.trunk.masking import (
    Masking,
    block_masking,
    grid_masking,
    mask_picture,
    masking_from_mask,
    random_masking,
    take,
)
from pipeline.models.trunk.vit import Tokens, ViT
from pipeline.pictures.patches import reconstruction_pictures
from pipeline.pictures.picture import Picture
from pipeline.stages.base import DataFacts, Losses
from pipeline.stages.features import FeatureOptions, FeatureStage

Ratio = Annotated[float, Field(gt=0, lt=1)]


class MaeOptions(FeatureOptions):
    """Options of stage `mae`; the defaults are the paper's."""

    decoder: DecoderConfig = DecoderConfig()
    masking: Literal["random", "block", "grid"] = "random"
    mask_ratio: Ratio | tuple[Ratio, Ratio] = 0.75  # a pair is a range: each step draws from it, evaluation takes the
    # middle
    predict_ratio: Ratio | None = None  # share of all patches predicted in training; None: all masked ones
    norm_pix: bool = True
    evaluate: tuple[Literal["reconstruction", "knn"], ...] = ("reconstruction",)

    @model_validator(mode="after")
    def _masks_something(self) -> MaeOptions:
        low, high = self.ratios
        if low > high:
            raise ValueError(f"mask_ratio must be low to high, not {low} to {high}")
        for ratio in self.ratios:
            num_kept = self.model.num_kept(ratio)
            if not 0 < num_kept < self.model.num_patches:
                raise ValueError(
                    f"mask_ratio {ratio} keeps {num_kept} of {self.model.num_patches} patches;"
                    " at least one must be kept and one masked"
                )
        if self.masking == "grid":
            side, grid = self.cell_side, self.model.grid
            if low != high or abs(1 - 1 / side**2 - low) > 0.005 or grid[0] % side or grid[1] % side:
                raise ValueError(
                    "masking grid keeps one patch of every square cell: mask_ratio must be .75, .889, .9375 and so on,"
                    f" and the cells must fit the grid of {grid[0]}x{grid[1]} patches"
                )
        if self.model.spatial:
            raise ValueError("windows, conv_blocks and relative_positions need whole images")
        return self

    @model_validator(mode="after")
    def _predicts_something(self) -> MaeOptions:
        if self.predict_ratio is not None:
            if self.decoder.attention != "cross":
                raise ValueError(
                    "predict_ratio needs decoder.attention: cross, where mask tokens don't attend to each other"
                )
            if not 0 < (self.num_predicted or 0) <= self.model.num_patches - self.model.num_kept(self.ratios[0]):
                raise ValueError(
                    f"predict_ratio {self.predict_ratio} must predict a patch, and no more than are masked"
                )
        return self

    @property
    def ratios(self) -> tuple[float, float]:
        """Lowest and highest mask ratio."""
        return self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio, self.mask_ratio)

    @property
    def cell_side(self) -> int:
        """Side of the cells of masking `grid`, in patches."""
        return round(math.sqrt(1 / (1 - self.ratios[0])))

    @property
    def num_predicted(self) -> int | None:
        """Number of patches predicted in training; None: all masked ones."""
        return None if self.predict_ratio is None else int(self.model.num_patches * self.predict_ratio)


class MaeStage(FeatureStage[MaeOptions]):
    """Trunk and decoder; after pretraining, `encode` gives features and `reconstruct` fills in masked patches."""

    options_class: ClassVar[type[Config]] = MaeOptions

    def __init__(self, options: MaeOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        maps = options.decoder.feature_maps
        # As in the official CrossMAE, a trunk that is tapped at every block has no norm after the last one.
        self.trunk = ViT(options.model.model_copy(update={"final_norm": False}) if maps else options.model)
        self.decoder = decoder(options.decoder, options.model)
        self.taps = tuple(range(-1, options.model.shape.depth)) if maps else ()

    def loss(self, batch: Batch) -> Losses:
        """Mean squared error over masked pixels, each patch normalised when `norm_pix`."""
        assert batch.images is not None
        pixels = normalize(batch.images, self.options.pixels)
        masking = self.masking(batch)
        if self.options.num_predicted is not None:
            masking = masking._replace(masked=masking.masked[:, -self.options.num_predicted :])
        prediction = self.predict_patches(pixels, masking, batch.seeds)
        total = (batch.weight * self.errors(pixels, masking, prediction)).sum()
        return Losses(total, {"reconstruction": total.detach()})

    def predict(self, batch: Batch) -> Predictions:
        """`reconstruction_mse` [B] as in `loss`, `mask` [B,N], `reconstruction` [B,3,H,W] uint8; for kNN `features`
        [B,D] of the whole image and `labels`.
        """
        assert batch.images is not None
        pixels = normalize(batch.images, self.options.pixels)
        masking = self.masking(batch)
        prediction = self.predict_patches(pixels, masking, batch.seeds)
        predictions = {
            "reconstruction_mse": self.errors(pixels, masking, prediction),
            "mask": mask_picture(masking),
            "reconstruction": self._filled_in(batch.images, pixels, masking, prediction),
        }
        return self.with_features(predictions, pixels, batch)

    def encode(self, images: UInt8[Tensor, "b 3 h w"]) -> Tokens:
        """Features of whole images: nothing is masked, and patches are in image order."""
        tokens: Tokens = self.trunk(normalize(images, self.options.pixels))
        return tokens

    def reconstruct(self, images: UInt8[Tensor, "b 3 h w"], mask: Bool[Tensor, "b n"]) -> UInt8[Tensor, "b 3 h w"]:
        """The images with the patches where `mask` is True replaced by their prediction from the others.

        With `norm_pix` the network predicts normalised patches; they get the mean and deviation of the true ones, as in
        the paper's figures.

        Raises:
            ValueError: rows of the mask hide different numbers of patches, or none or all.
        """
        pixels = normalize(images, self.options.pixels)
        masking = masking_from_mask(mask)
        return self._filled_in(images, pixels, masking, self.predict_patches(pixels, masking))

    def masking(self, batch: Batch) -> Masking:
        """The batch's masks, drawn from its seeds; a random ratio is drawn from its position, the same on all ranks."""
        assert batch.images is not None
        p = self.options.model.patch_size
        grid = (batch.images.shape[2] // p, batch.images.shape[3] // p)
        if self.options.masking == "grid":
            return grid_masking(batch.seeds, grid, self.options.cell_side)
        low, high = self.options.ratios
        share = float(uniform(torch.tensor([batch.position]), "mask_ratio", 1)) if self.training else 0.5
        num_kept = int(grid[0] * grid[1] * (1 - (low + (high - low) * share)))
        if self.options.masking == "block":
            return block_masking(batch.seeds, grid, num_kept)
        return random_masking(batch.seeds, grid[0] * grid[1], num_kept)

    def predict_patches(
        self, pixels: Float[Tensor, "b 3 h w"], masking: Masking, seeds: Tensor | None = None
    ) -> Float[Tensor, "b m P"]:
        """The network's prediction of the masked patches from the visible ones, in the order of `masking.masked`."""
        prediction: Tensor = self.decoder(self.trunk(pixels, keep=masking.keep, taps=self.taps, seeds=seeds), masking)
        return prediction

    def errors(
        self, pixels: Float[Tensor, "b 3 h w"], masking: Masking, prediction: Float[Tensor, "b m P"]
    ) -> Float[Tensor, " b"]:
        """Each sample's mean squared error over its masked patches."""
        target = take(patchify(pixels, self.options.model.patch_size), masking.masked)
        return masked_mse(prediction, normalize_patches(target) if self.options.norm_pix else target)

    def objective_evaluations(self) -> Mapping[str, Evaluation]:
        """Reconstruction error with masks from the samples' seeds."""
        return {"reconstruction": MeanEvaluation("reconstruction_mse")}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """Original, masked and reconstructed images of the first samples."""
        return reconstruction_pictures(batch, predictions, self.options.model.patch_size)

    def _filled_in(self, images: Tensor, pixels: Tensor, masking: Masking, prediction: Tensor) -> Tensor:
        """The images with masked patches replaced by their prediction; see `reconstruct`."""
        p = self.options.model.patch_size
        patches = patchify(pixels, p)
        prediction = prediction.to(patches.dtype)
        if self.options.norm_pix:
            mean, std = patch_statistics(take(patches, masking.masked))
            prediction = prediction * std + mean
        index = masking.masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        grid = (images.shape[2] // p, images.shape[3] // p)
        filled = denormalize(unpatchify(patches.scatter(1, index, prediction), grid), self.options.pixels)
        hidden = mask_picture(masking).view(-1, 1, *grid).repeat_interleave(p, 2).repeat_interleave(p, 3)
        return torch.where(hidden, filled, images)
