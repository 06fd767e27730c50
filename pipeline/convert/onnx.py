"""Segment Anything as two ONNX graphs, named and shaped as the package segment-anything's own export.

Legend: B images, M prompts of one image, P points of a prompt, C channels, S side of the model's input, h w = S / patch
places of an embedding, H W pixels of the stored image.

`encoder.onnx`: `images` [B,3,S,S], normalised, padded with zeros below and at the right -> `image_embeddings`
[B,C,h,w].

`decoder.onnx`: `image_embeddings` [1,C,h,w] of one image; `point_coords` [M,P,2], x y in pixels of the model's input;
`point_labels` [M,P]: 1 the object, 0 what isn't it, 2 and 3 a box's corners, -1 no point (give one of these with
points that come without a box, as the package does); `mask_input` [M,1,4h,4w], logits of an earlier answer, and
`has_mask_input` [M], 0 where it is nothing; `orig_im_size` [2] = (H, W) -> `masks` [M,4,H,W], logits; `iou_predictions`
[M,4]; `low_res_masks` [M,4,4h,4w]. Mask 0 is for prompts of several parts, 1 to 3 for a single one. All are float32.
The package's graph takes one prompt at a time; here M is free.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.models.sam.model import Embedded, SegmentAnything
from pipeline.models.sam.prompts import ABSENT, Prompts
from pipeline.stages.base import Stage
from pipeline.stages.sam import SamStage

ENCODER, DECODER, ABOUT = "encoder.onnx", "decoder.onnx", "sam.json"
DECODER_INPUTS = (
    "image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size",
)  # fmt: skip
DECODER_OUTPUTS = ("masks", "iou_predictions", "low_res_masks")
TOLERANCE = 1e-4  # of outputs, relative to the largest: sums of products come in another order
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


class Exported(NamedTuple):
    """What `export_sam` wrote, and how far the graphs' outputs are from the model's."""

    files: tuple[str, ...]
    differences: dict[str, float]  # largest of each output, over the largest value


class OnnxEncoder(nn.Module):
    """Images to embeddings."""

    def __init__(self, stage: SamStage) -> None:
        super().__init__()
        self.trunk, self.neck = stage.trunk, stage.neck

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c h w"]:
        """Encode."""
        tokens = self.trunk(images)
        embeddings: Tensor = self.neck(tokens.patches.transpose(1, 2).unflatten(2, tokens.grid))
        return embeddings


class OnnxDecoder(nn.Module):
    """Prompts about one image to masks; see above."""

    def __init__(self, stage: SamStage) -> None:
        super().__init__()
        self.parts = nn.ModuleList([stage.trunk, stage.neck, stage.prompt_encoder, stage.mask_decoder])
        self.size = stage.options.model.image_hw

    def forward(
        self,
        image_embeddings: Float[Tensor, "1 c h w"],
        point_coords: Float[Tensor, "m p 2"],
        point_labels: Float[Tensor, "m p"],
        mask_input: Float[Tensor, "m 1 y x"],
        has_mask_input: Float[Tensor, " m"],
        orig_im_size: Float[Tensor, " 2"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks at the stored image's size, their predicted IoU, and the masks as the model gives them."""
        labels = point_labels.long().clamp(min=ABSENT + 1)
        prompts = Prompts(torch.zeros_like(labels[:, 0]), point_coords, labels, mask_input, has_mask_input > 0)
        model = SegmentAnything(*self.parts)
        low, iou = model.decode(Embedded(image_embeddings, self.size), prompts)
        return self.stored(low, orig_im_size), iou, low

    def stored(self, low: Float[Tensor, "m k y x"], size: Float[Tensor, " 2"]) -> Float[Tensor, "m k H W"]:
        """As `pipeline.models.sam.predictor.stored_logits`: resized to the input, cut to what shows the image, resized.

        Bilinear resizing is a product with a matrix for each direction, which a size that is known only when the graph
        runs can be part of.
        """
        longest = max(self.size)
        shown = (longest / size.max() * size + 0.5).floor()  # pixels of the input that show the image
        for axis, side in ((0, self.size[0]), (1, self.size[1])):
            stored = size.long()[axis].item()
            torch._check(stored > 0)
            full = resizing(torch.arange(side), low.shape[2 + axis], torch.tensor(float(low.shape[2 + axis])), side)
            back = resizing(torch.arange(stored), side, shown[axis], size[axis])
            matrix = back @ full
            low = matrix @ low if axis == 0 else low @ matrix.T
        return low


def resizing(out: Tensor, num: int, sampled: Tensor, size: float | Tensor) -> Float[Tensor, "o num"]:
    """The matrix of a bilinear resize of `sampled` out of `num` values to `size` values, numbered `out`."""
    places = ((out.to(torch.float32) + 0.5) * (sampled / size) - 0.5).clamp(min=0)
    places = torch.minimum(places, sampled - 1)
    return (1 - (places[:, None] - torch.arange(num, dtype=torch.float32)).abs()).clamp(min=0)


def export_sam(stage: Stage, folder: str) -> Exported:
    """Write `encoder.onnx`, `decoder.onnx` and `sam.json` (how images are to be prepared), and run both graphs beside
    the model on drawn images and prompts.

    Args:
        stage: of kind `sam`, with square images.
        folder: a path or s3:// URL.

    Raises:
        ConfigError: it is another stage or its images aren't square; onnx, onnxscript or onnxruntime isn't installed;
            or the graphs don't compute what the model does.
    """
    if not isinstance(stage, SamStage):
        raise ConfigError("only stage sam can be exported to ONNX", where=folder, fix="give weights of stage sam")
    if stage.options.model.image_hw[0] != stage.options.model.image_hw[1]:
        raise ConfigError("ONNX graphs are of square images", where=folder, fix="train with a square image_size")
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(f"{', '.join(absent)} isn't installed", where=folder, fix="pip install 'vitrail[onnx]'")
    stage = stage.float().cpu().eval()
    graphs = {ENCODER: encoder_graph(stage), DECODER: decoder_graph(stage)}
    differences = parity(stage, graphs)
    wrong = {name: difference for name, difference in differences.items() if not difference <= TOLERANCE}
    if wrong:
        excess = ", ".join(f"{name} by {difference:.1e}" for name, difference in wrong.items())
        raise ConfigError(
            f"the graphs differ from the model: {excess} of the largest value", where=folder, fix="report this model"
        )
    written = {**graphs, ABOUT: json.dumps(_about(stage), indent=1).encode() + b"\n"}
    files = []
    for name, data in written.items():
        files.append(storage.join(folder, name))
        storage.write(files[-1], data)
    return Exported(tuple(files), differences)


def encoder_graph(stage: SamStage) -> bytes:
    """The encoder, for any number of images."""
    side = stage.options.model.image_hw[0]
    batch = torch.export.Dim("num_images")
    return _graph(
        OnnxEncoder(stage), (torch.zeros(2, 3, side, side),), ("images",), ("image_embeddings",), ({0: batch},)
    )


def decoder_graph(stage: SamStage) -> bytes:
    """The decoder, for any number of prompts with any number of points each, and images of any size."""
    num, points = torch.export.Dim("num_prompts"), torch.export.Dim("num_points")
    shapes = (None, {0: num, 1: points}, {0: num, 1: points}, {0: num}, {0: num}, None)
    return _graph(OnnxDecoder(stage), drawn_prompts(stage, 3, 4), DECODER_INPUTS, DECODER_OUTPUTS, shapes)


def drawn_prompts(stage: SamStage, num: int, points: int, size: tuple[int, int] = (37, 50)) -> tuple[Tensor, ...]:
    """Inputs of the decoder: points with all kinds of labels, every other prompt with a mask."""
    draw = torch.Generator().manual_seed(num)
    side, (h, w) = stage.options.model.image_hw[0], stage.options.model.grid
    return (
        torch.randn(1, stage.options.sam.channels, h, w, generator=draw),
        torch.rand(num, points, 2, generator=draw) * side,
        torch.randint(-1, 4, (num, points), generator=draw).float(),
        torch.randn(num, 1, 4 * h, 4 * w, generator=draw),
        (torch.arange(num) % 2).float(),
        torch.tensor([float(size[0]), float(size[1])]),
    )


@torch.no_grad()
def parity(stage: SamStage, graphs: Mapping[str, bytes]) -> dict[str, float]:
    """The largest difference of each output between graph and model, over the output's largest value: for two numbers
    of images, and of prompts and points, and two sizes of the stored image.
    """
    side = stage.options.model.image_hw[0]
    largest: dict[str, float] = {}
    encoder, decoder = (_session(graphs[name]) for name in (ENCODER, DECODER))
    for num in (1, 3):
        images = torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(num))
        outputs = encoder.run(None, {"images": images.numpy()})
        _record_differences(largest, ["image_embeddings"], outputs, [OnnxEncoder(stage)(images)])
    for num, points, size in ((1, 2, (50, 37)), (5, 3, (2 * side, side))):
        prompts = drawn_prompts(stage, num, points, size)
        outputs = decoder.run(None, {name: value.numpy() for name, value in zip(DECODER_INPUTS, prompts, strict=True)})
        _record_differences(largest, DECODER_OUTPUTS, outputs, OnnxDecoder(stage)(*prompts))
    return largest


def _record_differences(
    largest: dict[str, float], names: Sequence[str], of_graph: Sequence[np.ndarray], of_model: Sequence[Tensor]
) -> None:
    """Raise each output's largest difference to that of these two, over the model's largest value."""
    for name, graph, tensor in zip(names, of_graph, of_model, strict=True):
        model = tensor.numpy()
        if graph.shape != model.shape:
            raise ConfigError(f"{name} of shape {graph.shape}, not {model.shape}", where="ONNX", fix="report this")
        difference = float(np.abs(graph - model).max() / max(float(np.abs(model).max()), 1e-12))
        largest[name] = max(largest.get(name, 0.0), difference)


def _graph(
    module: nn.Module, arguments: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str], shapes: Any
) -> bytes:
    """A module as one ONNX file."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            arguments,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)  # type: ignore[arg-type]  # it takes files, too
    return buffer.getvalue()


def _session(graph: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _about(stage: SamStage) -> dict[str, Any]:
    return {
        "format": "vitrail.sam.onnx",
        "format_version": 1,
        "image_size": stage.options.model.image_hw[0],
        "pixels": stage.options.pixels,
        "resize": "longest side to image_size, then padded with zeros below and at the right, after normalising",
    }
