"""What all formats share: weights under our names with their stage and its options, and reading sizes off tensors.

Legend: D width, N patches, R rows of a position table (N, and one for each prefix token that has a position).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pipeline.config import Config, Document, validate
from pipeline.convert.loading import LoadReport, load_initial
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.pixels import PixelStatistics
from pipeline.models.trunk.config import SIZES, Gelu, Interpolation, ModelConfig, Position, Size
from pipeline.models.trunk.position import sincos2d
from pipeline.stages import STAGES, stage_class
from pipeline.stages.base import DataFacts, Stage
from pipeline.stages.images import ImageOptions

FIXED_POSITIONS: tuple[Position, ...] = ("sincos2d", "sincos2d_bigvision")
CHECK_FORMAT = "check the format's name and that the file is whole"


class Known(Config):
    """What tensors can't tell and the caller knows. Each format takes some of these."""

    heads: int | None = None  # attention heads of the trunk
    decoder_heads: int | None = None  # of MAE's decoder
    text_heads: int | None = None  # of the text tower
    norm_pix: bool | None = None  # whether MAE's targets were normalised patches
    image_size: int | tuple[int, int] | None = None  # pixels; (height, width) when not square
    norm_eps: float | None = None  # of LayerNorm
    gelu: Gelu | None = None
    pixels: PixelStatistics | None = None  # mean and deviation that images were normalised with
    tokenizer: str | None = None  # of the text tower: clip, a vocab.txt or a tokenizer.json
    probe_head: int | None = None  # in writing: which of a probe's heads, from 0


class WeightFile(NamedTuple):
    """A weight file as it was read: tensors by the other project's names, and its configuration."""

    where: str
    state: dict[str, Tensor]
    config: Document  # config.json beside it, metadata or training arguments; may be empty


class Weights(NamedTuple):
    """Weights under our names."""

    where: str
    stage: str
    options: Document
    state: dict[str, Tensor]  # in the file's own precision
    classes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("",)  # prefixes of the stage's parameters that are held; the others start anew
    ignored: tuple[str, ...] = ()  # names in the file that were left out on purpose
    description: str = "weights of the file"  # which of a run's they are, in words


class Written(NamedTuple):
    """Weights under another project's names."""

    state: dict[str, Tensor]
    config: Document  # what the other project needs to build the model
    dropped: tuple[str, ...]  # of ours, which the format has no place for


class Format(abc.ABC):
    """One project's way to name and lay out weights."""

    name: ClassVar[str]
    takes: ClassVar[tuple[str, ...]]  # fields of Known that mean something here
    wrapped_in: ClassVar[str | None] = None  # key around the tensors in a pickle
    config_file: ClassVar[str | None] = None  # written beside the weights when the target is a folder
    named_arrays: ClassVar[bool] = False  # kept as .npz, and read from t5x's folders too
    folder_files: ClassVar[tuple[str, ...]] = ()  # of weights in a folder, tried before the names all formats share
    pickles: ClassVar[bool] = True  # whether the format is also found in PyTorch's own files
    arrays: ClassVar[bool] = False  # whether it is also found in pickles of numpy arrays (.pkl)

    @abc.abstractmethod
    def read(self, source: WeightFile, known: Known) -> Weights:
        """Our names and options for a file's tensors.

        Raises:
            CheckpointError: they are no such model, or one that ours can't express.
            ConfigError: something that tensors can't tell isn't known.
        """

    @abc.abstractmethod
    def write(self, weights: Weights, known: Known) -> Written:
        """The format's names for our tensors.

        Raises:
            ConfigError: the format can't express this model.
        """


def build(weights: Weights, data: DataFacts | None = None) -> tuple[Stage, LoadReport]:
    """A stage with these weights (fp32, eval mode), and what became of each name. Parts that the weights don't hold
    are drawn from torch's global generator.

    Args:
        data: what the stage is to know of data; None: the weights' own classes.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape than the options imply.
        ConfigError: the options are impossible.
    """
    cls, options = checked_options(weights)
    stage = cls(options, DataFacts(weights.classes) if data is None else data)
    wanted = dict.fromkeys(name for name in stage.state_dict() if name.startswith(weights.parts))
    missing = [name for name in wanted if name not in weights.state]
    beyond = sorted(name for name in weights.state if name not in wanted)  # files keep tensors in any order
    if missing or beyond:
        lacks = f"lacks {listed(missing)}" if missing else ""
        holds = f"holds {listed(beyond)}, which stage {weights.stage!r} has no place for" if beyond else ""
        raise CheckpointError(
            "it " + " and ".join(filter(None, (lacks, holds))),
            where=weights.where,
            fix=f"{CHECK_FORMAT}, or else this variant of the architecture isn't supported",
        )
    report = load_initial(stage, weights.state, weights.parts, where=weights.where, fix=CHECK_FORMAT)
    return stage.eval(), report._replace(ignored=list(weights.ignored))


def load_table(weights: Weights) -> LoadReport:
    """What would become of each name in `build`, with the same errors, at no cost in memory."""
    with torch.device("meta"):
        return build(weights)[1]


def checked_options(weights: Weights) -> tuple[type[Stage], ImageOptions]:
    """The stage's class and its options, validated."""
    cls = stage_class(weights.stage)
    options = validate(cls.options_class, weights.options, where=weights.where, prefix="options")
    assert isinstance(options, ImageOptions)
    return cls, options


def of_stage(stage: Stage, *, where: str = "the stage") -> Weights:
    """A stage's own weights, not copied."""
    name = next((name for name in STAGES if stage_class(name) is type(stage)), None)
    options = stage.options
    if name is None or not isinstance(options, ImageOptions):
        raise ConfigError(f"{type(stage).__name__} is no registered stage", where=where, fix="add it to STAGES")
    document = options.model_dump(mode="json", exclude_unset=True)
    state = {key: value.detach() for key, value in stage.state_dict().items()}
    return Weights(where, name, document, state, tuple(stage.data.classes))


def require_known(known: Known, missing: Mapping[str, str], *, where: str) -> None:
    """Raise one ConfigError for all fields of `missing` (field of Known: hint) that aren't known."""
    absent = {name: hint for name, hint in missing.items() if getattr(known, name) is None}
    if absent:
        raise ConfigError(
            f"the tensors don't tell {' and '.join(absent)}",
            where=where,
            fix="give " + ", ".join(f"{name}=... ({hint})" for name, hint in absent.items()),
        )


def complete(known: Known, in_file: Document, *, where: str) -> Known:
    """What the caller knows, completed by what the file states; None in the file states nothing."""
    from_file = validate(Known, {name: value for name, value in in_file.items() if value is not None}, where=where)
    return from_file.model_copy(update=known.model_dump(exclude_none=True))


def heads_hint(width: int, depth: int) -> str:
    """How many heads a model of this shape usually has, for messages."""
    named = [(name, size.heads) for name, size in SIZES.items() if (size.width, size.depth) == (width, depth)]
    return f"ViT-{named[0][0]} has {named[0][1]}" if named else f"a divisor of the width, {width}"


class TrunkShape(NamedTuple):
    """Sizes that are read off a trunk's tensors."""

    width: int
    depth: int
    mlp_width: int
    patch_size: int
    registers: int
    cls_token: bool


def trunk_shape(state: Mapping[str, Tensor], *, where: str) -> TrunkShape:
    """Sizes of a trunk whose tensors have our names without `trunk.`.

    Raises:
        CheckpointError: a tensor they are read off is missing or has an impossible shape.
    """
    embed = tensor(state, "patch_embed.proj.weight", 4, where)
    width, channels, patch_size, across = embed.shape
    if channels != 3 or patch_size != across:
        raise CheckpointError(
            f"patches are {channels}x{patch_size}x{across}",
            where=where,
            fix="give a model of colour images with square patches",
        )
    depth = num_blocks(state, "blocks.")
    hidden = tensor(state, "blocks.0.mlp.fc1.weight", 2, where)
    registers = tensor(state, "reg_token", 3, where).shape[1] if "reg_token" in state else 0
    return TrunkShape(width, depth, hidden.shape[0], patch_size, registers, "cls_token" in state)


def tensor(state: Mapping[str, Tensor], name: str, dimensions: int, where: str) -> Tensor:
    """The tensor of that name.

    Raises:
        CheckpointError: there is none, or it has another number of dimensions.
    """
    value = state.get(name)
    if value is None or value.ndim != dimensions:
        what = "no" if value is None else f"a {value.ndim}-dimensional"
        raise CheckpointError(
            f"{what} {name}, where one of {dimensions} dimensions was expected (it holds {listed(list(state))})",
            where=where,
            fix=CHECK_FORMAT,
        )
    return value


def num_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks lie under `prefix`: the highest number plus one."""
    numbers = [name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


class Conventions(NamedTuple):
    """What all models of a project have in common and tensors can't tell."""

    interpolation: Interpolation  # of the position table
    norm_eps: float
    gelu: Gelu
    pixels: PixelStatistics


def model_options(
    shape: TrunkShape, table: Tensor, grid: tuple[int, int], known: Known, conventions: Conventions
) -> tuple[Document, Tensor | None]:
    """Options of the trunk, and its position table [1, cls + N, D], None where it is a fixed one.

    Args:
        table: [1,R,D]; rows beyond N are those of the prefix tokens.
    """
    assert known.heads is not None
    size = Size(shape.width, shape.depth, shape.mlp_width, known.heads)
    name = next((name for name, known_size in SIZES.items() if known_size == size), None)
    options: Document = {"size": name} if name else size._asdict()
    options |= {
        "image_size": [side * shape.patch_size for side in grid],
        "patch_size": shape.patch_size,
        "cls_token": shape.cls_token,
        "registers": shape.registers,
        "interpolation": conventions.interpolation,
        "norm_eps": chosen(known.norm_eps, conventions.norm_eps),
        "gelu": chosen(known.gelu, conventions.gelu),
    }
    if grid[0] == grid[1]:
        options["image_size"] = grid[0] * shape.patch_size
    kind = fixed_kind(table, grid)
    if kind is not None:
        return {**options, "position": kind}, None
    num_patches = grid[0] * grid[1]
    rows = int(shape.cls_token) + num_patches
    patches = table[:, -num_patches:]
    prefix = table[:, : table.shape[1] - num_patches][:, : int(shape.cls_token)]
    blank = torch.zeros(1, rows - num_patches - prefix.shape[1], shape.width, dtype=table.dtype)
    return {**options, "position": "learned"}, torch.cat([prefix, blank, patches], dim=1)


def fixed_kind(table: Tensor, grid: tuple[int, int]) -> Position | None:
    """Which fixed table of a grid this is, bit for bit, with zeros for prefix tokens; None when it is no such."""
    num_patches = grid[0] * grid[1]
    if table.shape[2] % 4 or table.dtype != torch.float32 or table[:, : table.shape[1] - num_patches].any():
        return None
    patches = table[0, -num_patches:]
    return next((kind for kind in FIXED_POSITIONS if torch.equal(patches, sincos2d(grid, table.shape[2], kind))), None)


def native_grid(shape: TrunkShape, table: Tensor, known: Known, *, where: str) -> tuple[int, int]:
    """Rows and columns of the grid a position table [1,R,D] is for: known, or a fixed table's, or else square."""
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != shape.width:
        raise CheckpointError(
            f"the position table is {tuple(table.shape)}, not 1 x rows x {shape.width}",
            where=where,
            fix=CHECK_FORMAT,
        )
    num_rows = table.shape[1]
    prefixes = dict.fromkeys((int(shape.cls_token), 0, int(shape.cls_token) + shape.registers))
    if known.image_size is not None:
        size = known.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        grid = (height // shape.patch_size, width // shape.patch_size)
        if height % shape.patch_size or width % shape.patch_size or num_rows - grid[0] * grid[1] not in prefixes:
            raise CheckpointError(
                f"image_size {height}x{width} doesn't fit {num_rows} positions of {shape.patch_size}-pixel patches",
                where=where,
                fix="give the size the position table was made for",
            )
        return grid
    for num_patches in (num_rows - prefix for prefix in prefixes):
        for grid in _factors(num_patches):
            if fixed_kind(table, grid) is not None:
                return grid
    # Without registers, a table without a row for cls could as well be one with it, of a grid that isn't square: ask.
    likely = (0, int(shape.cls_token) + shape.registers) if shape.registers else (int(shape.cls_token),)
    for num_patches in (num_rows - prefix for prefix in likely):
        side = math.isqrt(max(num_patches, 0))
        if num_patches > 0 and side * side == num_patches:
            return side, side
    raise ConfigError(
        f"{num_rows} positions are no square grid, so the tensors don't tell image_size",
        where=where,
        fix="give image_size=[height,width] in pixels",
    )


def _factors(count: int) -> Iterator[tuple[int, int]]:
    """Grids of `count` patches, square ones first."""
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    yield from sorted(pairs, key=lambda pair: abs(pair[0] - pair[1]))


class Trunk(NamedTuple):
    """A trunk that is to be written."""

    model: ModelConfig
    state: dict[str, Tensor]  # without `trunk.`, and without the position table
    table: Tensor  # [1, cls + N, D]


def trunk_of(weights: Weights) -> Trunk:
    """The trunk of any stage, with its position table written out where it is a fixed one."""
    _, options = checked_options(weights)
    model = options.model
    state = under(weights.state, "trunk.")
    table = state.pop("pos_embed", None)
    if table is None:
        like = state["patch_embed.proj.weight"]
        fixed = sincos2d(model.grid, model.shape.width, model.position).to(like.dtype)
        table = torch.cat([torch.zeros(int(model.cls_token), model.shape.width, dtype=like.dtype), fixed])[None]
    return Trunk(model, state, table)


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, which is taken off."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with a prefix put before their names."""
    return {prefix + name: value for name, value in state.items()}


def refuse(format_name: str, where: str, reasons: Mapping[str, bool]) -> None:
    """Raise ConfigError for the first reason (in words) that is true."""
    for reason, true in reasons.items():
        if true:
            raise ConfigError(
                f"format {format_name!r} can't express {reason}", where=where, fix="choose another format, or vitrail"
            )


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more follow."""
    more = len(names) - most
    return (", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")) or "nothing"


def chosen(value: Any, *otherwise: Any) -> Any:
    """The first that isn't None."""
    return next((item for item in (value, *otherwise) if item is not None), None)


def known_for(form: Format, known: Mapping[str, Any]) -> Known:
    """Checked facts for a format.

    Raises:
        ConfigError: a fact that doesn't exist, or means nothing for the format.
    """
    facts = validate(Known, dict(known), where=f"known facts for format {form.name!r}")
    odd = [name for name in known if name not in form.takes]
    if odd:
        raise ConfigError(
            f"{odd[0]} means nothing in format {form.name!r}",
            where="known facts",
            fix=f"it takes {', '.join(form.takes) or 'none'}",
        )
    return facts
