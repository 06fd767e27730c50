"""Loading weights into a stage: strictly, with a table of what became of each name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import CheckpointError
from pipeline.models.trunk.config import SIZES
from pipeline.models.trunk.position import interpolate
from pipeline.stages.base import Stage

TRUNK = "trunk."
POSITION_TABLE = "trunk.pos_embed"
PATCHES = "trunk.patch_embed.proj.weight"
SAME_MODEL = "make options.model the same as in the run the weights come from"
UNSEEN_IN_SHAPES = ("heads", "gelu", "norm_eps", "position")
"""Options of the trunk that change what the same weights compute, though every shape fits."""
TEXT_UNSEEN_IN_SHAPES = ("tokenizer", "vocab_size", "heads", "causal", "pooling", "mask_padding", "gelu", "norm_eps")
"""The same of a text tower: with other tokens an embedding's rows mean other words."""
NO_POSITIONS = ("position", "none")


class LoadReport(NamedTuple):
    """What became of each name."""

    loaded: list[str]
    resized: list[str]
    new: list[str]  # of the stage, keeping their initial values
    ignored: list[str]  # of the source

    def lines(self) -> list[str]:
        """For the log: the table of what was loaded, resized, new and ignored."""
        return [
            f"  {label:8s} {len(names):4d}  {by_part(names)}"
            for label, names in zip(("loaded", "resized", "new", "ignored"), self, strict=True)
        ]


def check_same_trunk(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, where: str) -> None:
    """Compare those options of two trunks that no tensor's shape shows; both are dumped `ModelConfig`s ({}: unknown).

    A trunk that was trained without positions (MP3) may get any: they are new, like a head.

    Raises:
        CheckpointError: they differ, so the weights would mean something else here.
    """
    differing = [
        f"{key} {_option(theirs, key)} there and {_option(ours, key)} here"
        for key in UNSEEN_IN_SHAPES
        if theirs and _option(ours, key) != _option(theirs, key) and (key, _option(theirs, key)) != NO_POSITIONS
    ]
    if differing:
        raise CheckpointError(
            f"the trunk isn't the same: {', '.join(differing)}",
            where=where,
            fix=SAME_MODEL,
        )


def check_same_text(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, where: str) -> None:
    """Compare those options of two text towers that no tensor's shape shows ({}: unknown, or defaults).

    Raises:
        CheckpointError: they differ, so tokens or what is computed from them would mean something else.
    """
    differing = [
        f"{key} {theirs.get(key)} there and {ours.get(key)} here"
        for key in TEXT_UNSEEN_IN_SHAPES
        if theirs and theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"the text tower isn't the same: {', '.join(differing)}",
            where=where,
            fix="make options.text the same as in the run the weights come from, or leave text. out of init_prefixes",
        )


def reaches(prefixes: Sequence[str], part: str) -> bool:
    """Whether names that begin with one of `prefixes` may lie in `part`, such as "text."."""
    return any(prefix.startswith(part) or part.startswith(prefix) for prefix in prefixes)


def load_initial(
    stage: Stage, weights: Mapping[str, Tensor], prefixes: Sequence[str], *, where: str, fix: str | None = None
) -> LoadReport:
    """Copy the parameters under `prefixes` from `weights` into a stage that was just built (fp32).

    Loading is strict: each such parameter must exist in `weights` in its shape. There are three exceptions. A trained
    position table is interpolated to the stage's grid. A table that the source lacks since its own was fixed keeps its
    initial values, as does what adds nothing until it is trained (`ViT.adds_nothing_at_first`). And where the stage
    allows it, a patch embedding is resized to the stage's patches.

    Args:
        where: where the weights come from, for messages.
        fix: what to do about a parameter that is missing or of another shape; by default, advice on `init_from`.

    Raises:
        CheckpointError: a parameter is missing, or has another shape.
    """
    targets = {**dict(stage.named_parameters()), **{n: b for n, b in stage.named_buffers() if n in stage.state_dict()}}
    loaded: list[str] = []
    resized: list[str] = []
    new: list[str] = []
    for name, target in targets.items():
        if not any(name.startswith(prefix) for prefix in prefixes):
            new.append(name)
            continue
        source = weights.get(name)
        may_start_anew = name == POSITION_TABLE or (
            name.startswith(TRUNK) and stage.trunk.adds_nothing_at_first(name.removeprefix(TRUNK))
        )
        if source is None and may_start_anew:
            new.append(name)
            continue
        if source is None:
            raise CheckpointError(
                f"they hold no {name}",
                where=where,
                fix=fix or "check init_from, or narrow init_prefixes to what it holds",
            )
        if source.shape != target.shape and name == POSITION_TABLE:
            source = _resized_table(stage, source, where)
            resized.append(name)
        elif name == PATCHES and stage.resizes_patches and _differ_in_size_alone(source, target):
            source = F.interpolate(source.float(), target.shape[2:], mode="bicubic", align_corners=False)
            resized.append(name)
        elif source.shape != target.shape:
            raise CheckpointError(
                f"{name} is {_shape(source)} there and {_shape(target)} here",
                where=where,
                fix=fix or SAME_MODEL,
            )
        else:
            loaded.append(name)
        with torch.no_grad():
            target.copy_(source)
    taken = {*loaded, *resized}
    return LoadReport(loaded, resized, new, [name for name in weights if name not in taken])


def _resized_table(stage: Stage, source: Tensor, where: str) -> Tensor:
    """A position table [1, prefix + N, D] of a square grid, evaluated for the trunk's own grid.

    A row for a cls token is left out where the trunk has none: n and n + 1 are never both squares above 1.
    """
    config = stage.trunk.config
    num_prefix = int(config.cls_token)
    if num_prefix == 0 and math.isqrt(max(source.shape[1] - 1, 0)) ** 2 == source.shape[1] - 1:
        source = source[:, 1:]  # of the cls token, which a trunk for dense prediction leaves behind
    num_patches = source.shape[1] - num_prefix
    side = math.isqrt(max(num_patches, 0))
    if side * side != num_patches or source.shape[2] != stage.trunk.width:
        raise CheckpointError(
            f"{POSITION_TABLE} is {_shape(source)}, which isn't a square grid of this width",
            where=where,
            fix=SAME_MODEL,
        )
    table = interpolate(source[0, num_prefix:].float(), (side, side), config.position_grid, config.interpolation)
    return torch.cat([source[:, :num_prefix].float(), table.unsqueeze(0)], dim=1)


def _differ_in_size_alone(source: Tensor, target: Tensor) -> bool:
    """Whether two patch embeddings [D,3,p,p] are for patches of different size, and otherwise alike."""
    return source.ndim == target.ndim == 4 and source.shape[:2] == target.shape[:2] and source.shape != target.shape


def _option(model: Mapping[str, Any], key: str) -> object:
    """An option of a dumped `ModelConfig`; the number of heads may follow from the size's name."""
    value = model.get(key)
    if key == "heads" and value is None and model.get("size") in SIZES:
        return SIZES[model["size"]].heads
    return value


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def by_part(names: Sequence[str]) -> str:
    """Names by their first two parts, with counts, on one line."""
    counts: dict[str, int] = {}
    for name in names:
        head = ".".join(name.split(".")[:2])
        counts[head] = counts.get(head, 0) + 1
    return ", ".join(f"{head} ({count})" if count > 1 else head for head, count in counts.items())
