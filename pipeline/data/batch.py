"""What travels from shards to a stage: a sample's bytes, one example, a batch.

Legend: B samples of this micro batch, H W pixels, L tokens of text.

Randomness contract: everything random about a sample (crop, flip, mask, noise, drop path) derives from
`Batch.seeds`, which depends on (seed, epoch, id) alone. So a batch is the same after a resume, on another number of
ranks, and when a stage runs it twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from pipeline.data.images.views import View


class RawSample(NamedTuple):
    """One sample as it lies in a tar: members by lower-case extension, still encoded."""

    id: int  # index in the data set's manifest order, [0, num_samples)
    key: str
    members: Mapping[str, bytes | memoryview]  # views of what was read at once, where they are large

    def member(self, extension: str) -> bytes | None:
        """A member's content, None where there is none."""
        data = self.members.get(extension)
        return None if data is None else bytes(data)


class Instances(NamedTuple):
    """The annotated objects of one image. Masks stay run-length encoded until a stage needs pixels."""

    boxes: Float[Tensor, "n 4"]  # x0 y0 x1 y1, pixels of the image at hand
    labels: Int[Tensor, " n"]
    masks: tuple[Mapping[str, object], ...]  # COCO RLE: {"size": [h, w], "counts": bytes}; none where boxes suffice
    crowd: Int[Tensor, " n"]  # 1 = crowd region
    view: View | None = None  # how the image at hand shows the stored one; None: it is the stored one
    areas: Float[Tensor, " n"] | None = None  # as annotated, in pixels of the stored image, by which COCO counts sizes


class Example(NamedTuple):
    """One transformed sample; fields a stage doesn't use stay None. `image` is uint8 [3,H,W]."""

    image: UInt8[Tensor, "3 h w"] | None = None
    text: Int[Tensor, " l"] | None = None
    label: int | None = None
    instances: Instances | None = None


@runtime_checkable  # tests check annotations at run time
class Transform(Protocol):
    """Turns a raw sample into an example; runs in loader workers, so it must pickle.

    Raises `pipeline.data.images.decode.UnreadableSample` for a sample that can't be used: its slot keeps weight 0.
    """

    def __call__(self, sample: RawSample, seed: int) -> Example: ...

    def blank(self) -> Example:
        """An example of the right shapes, to fill the slot of an absent sample."""
        ...


@runtime_checkable
class SeveralTransform(Protocol):
    """A transform that makes several examples of one sample at less than that many times the work."""

    def several(self, sample: RawSample, seeds: Sequence[int]) -> Sequence[Example]:
        """One example for each seed; together they are a function of the sample and all the seeds."""
        ...


OF_THE_BATCH: Mapping[str, Any] = {"one value": "for the whole batch"}  # a field's metadata; others have one a sample


@dataclasses.dataclass(frozen=True)
class Batch:
    """A micro batch. A stage's forward is a function of (weights, batch), nothing else.

    Fields are listed here alone: cutting, moving to a device and the way from a loader worker go by them.
    """

    ids: Int[Tensor, " b"]  # index in the data set; -1 for padding
    seeds: Int[Tensor, " b"]  # int64 >= 0
    weight: Float[Tensor, " b"]  # 0 = absent: out of loss, negatives and metrics
    # Samples of the run seen before this batch's global batch; drives schedules.
    position: int = dataclasses.field(metadata=OF_THE_BATCH)
    images: UInt8[Tensor, "b 3 h w"] | None = None
    text: Int[Tensor, "b l"] | None = None
    labels: Int[Tensor, " b"] | None = None
    instances: tuple[Instances, ...] | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def at(self, rows: slice) -> Batch:
        """Some of the samples; tensors are views."""
        return dataclasses.replace(self, **{name: values[rows] for name, values in self.per_sample().items()})

    def cut(self, size: int) -> tuple[Batch, ...]:
        """Batches of `size` samples, the last perhaps smaller; tensors are views of the whole."""
        return tuple(self.at(slice(start, start + size)) for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; what isn't a tensor (instances) stays where it is."""
        moved: dict[str, Any] = {n: t.to(device, non_blocking=True) for n, t in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def per_sample(self) -> dict[str, Any]:
        """What there is for each sample, by the field's name: all fields but those of the batch as a whole."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if not field.metadata}
        return {name: value for name, value in values.items() if value is not None}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors there are, by the field's name."""
        return {name: value for name, value in self.per_sample().items() if isinstance(value, Tensor)}


def collate(
    examples: Sequence[Example], ids: Sequence[int], seeds: Sequence[int], weight: Sequence[float], position: int
) -> Batch:
    """Stack examples of equal shapes into a batch; a field is None when it is None in every example.

    Raises:
        ValueError: a field is there in some examples only, or its shapes differ.
    """
    images = _all_or_none("image", [e.image for e in examples])
    text = _all_or_none("text", [e.text for e in examples])
    labels = _all_or_none("label", [e.label for e in examples])
    instances = _all_or_none("instances", [e.instances for e in examples])
    return Batch(
        ids=torch.tensor(ids, dtype=torch.int64),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        weight=torch.tensor(weight, dtype=torch.float32),
        position=position,
        images=None if images is None else _stack("image", images),
        text=None if text is None else _stack("text", text),
        labels=None if labels is None else torch.tensor(labels, dtype=torch.int64),
        instances=None if instances is None else tuple(instances),
    )


FieldT = TypeVar("FieldT")


def _all_or_none(name: str, values: Sequence[FieldT | None]) -> list[FieldT] | None:
    present = [value for value in values if value is not None]
    if not present:
        return None
    if len(present) != len(values):
        raise ValueError(f"{len(values) - len(present)} of {len(values)} examples have no {name}")
    return present


def _stack(name: str, tensors: Sequence[Tensor]) -> Tensor:
    try:
        return torch.stack(list(tensors))
    except RuntimeError as error:
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        raise ValueError(f"the examples' {name} shapes differ: {shapes}") from error


def derive_seed(*parts: SupportsIndex | str) -> int:
    """A 63-bit seed from any mix of numbers and names, stable over machines, processes and Python versions."""
    plain = tuple(
        part if isinstance(part, str) else operator.index(part) for part in parts
    )  # numpy's integers print otherwise
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generators(seeds: Int[Tensor, " b"], purpose: str) -> list[torch.Generator]:
    """One CPU generator per sample; `purpose` keeps draws for masks, noise and so on independent."""
    return [torch.Generator().manual_seed(derive_seed(purpose, int(s))) for s in seeds.tolist()]
