"""Weights from and to other projects' files.

    stage = pipeline.convert.load("mae_visualize_vit_base.pth", "mae", heads=12, decoder_heads=16, norm_pix=False)
    pipeline.convert.save(stage, "vit/", "hf_vit_mae")

Nothing in a file is executed. Sizes are read off the tensors; the caller gives what tensors can't tell, and names and
shapes are checked before a stage is built. A format is one class with `read` and `write` and one line in `FORMATS`.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from pipeline.config import entry_of
from pipeline.convert.detectron2 import Detectron2
from pipeline.convert.files import read_source, write_target
from pipeline.convert.flip_jax import FlipJax
from pipeline.convert.hf_clip import HuggingFaceClip
from pipeline.convert.huggingface import HuggingFaceVit, HuggingFaceVitMae
from pipeline.convert.mae import Mae, MaeEncoder
from pipeline.convert.native import Native
from pipeline.convert.open_clip import OpenClip
from pipeline.convert.segment_anything import HuggingFaceSam, SegmentAnythingFormat
from pipeline.convert.timm import TimmVit
from pipeline.convert.weights import Format, Weights, build, known_for, load_table, of_stage
from pipeline.stages.base import Stage

log = logging.getLogger(__name__)

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Native(),
        Mae(),
        MaeEncoder(),
        TimmVit(),
        HuggingFaceVitMae(),
        HuggingFaceVit(),
        OpenClip(),
        HuggingFaceClip(),
        FlipJax(),
        Detectron2(),
        SegmentAnythingFormat(),
        HuggingFaceSam(),
    )
}


class Saved(NamedTuple):
    """What `save` did."""

    files: list[str]
    num_tensors: int
    dropped: tuple[str, ...]  # our names that the format has no place for


def load(path: str, format: str, **known: Any) -> Stage:
    """The stage a weight file holds, fp32 and in eval mode; its load table goes to the log.

    Args:
        path: a file (.safetensors, .pth, .pt, .bin, .ckpt) or a folder with one and its config.json; local or s3://.
        format: a name in FORMATS.
        known: what tensors can't tell, such as heads=12; an error names what is missing. See `Known`.

    Raises:
        CheckpointError: the file can't be read, or doesn't hold such a model.
        ConfigError: no such format, or something must be known.
    """
    weights = read(path, format, **known)
    stage, report = build(weights)
    log.info("%s from %s", weights.stage, path)
    for line in report.lines():
        log.info("%s", line)
    return stage


def read(path: str, format: str, **known: Any) -> Weights:
    """The tensors under our names, in the file's precision; arguments and errors are those of `load`."""
    form = format_named(format)
    weights = form.read(read_source(path, form), known_for(form, known))
    load_table(weights)
    return weights


def save(source: Stage | Weights, path: str, format: str, **known: Any) -> Saved:
    """Write a stage's weights, or those that were read, as another project's file.

    Args:
        path: a file (.safetensors, .pth, .pt, .bin, .ckpt); a folder for formats with a config.json.
        known: what the weights don't tell, such as probe_head=2.

    Raises:
        ConfigError: the format can't express this model, or there is no such format.
        StorageError: the place can't be written.
    """
    form = format_named(format)
    weights = of_stage(source) if isinstance(source, Stage) else source
    written = form.write(weights, known_for(form, known))
    files = write_target(path, written, form)
    return Saved(files, len(written.state), written.dropped)


def format_named(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    return entry_of(FORMATS, name, what="weight format", where="format")
