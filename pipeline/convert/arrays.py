"""Pickles of numpy arrays, as Caffe2 and detectron2 keep weights, read without executing anything in them."""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MULTIARRAY = {"numpy.core.multiarray", "numpy._core.multiarray"}


class ForbiddenObject(pickle.UnpicklingError):
    """The pickle asks for something other than plain containers and arrays."""


class _Unpickler(pickle.Unpickler):
    """Builds containers, numbers, texts and arrays of numbers; whatever else is asked for, even by name, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _MULTIARRAY and name in ("_reconstruct", "scalar"):
            return _array if name == "_reconstruct" else _scalar
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _ArrayKind if name == "ndarray" else _dtype
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise ForbiddenObject(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise ForbiddenObject("an object kept elsewhere")


def load_arrays(content: bytes) -> Any:
    """The object of a pickle; texts of Python 2's are Latin-1, as detectron2 reads them.

    Raises:
        ForbiddenObject: it holds anything that isn't data.
        Exception: it is damaged, in any way the unpickler can say so.
    """
    return _Unpickler(io.BytesIO(content), encoding="latin1").load()


def dump_arrays(state: Mapping[str, Tensor], wrapped_in: str | None) -> bytes:
    """Tensors by name as a pickle of arrays; bf16, which numpy doesn't have, as fp32.

    detectron2 takes a file by someone who isn't its author as one of names that match exactly.
    """
    arrays = {
        name: (value.float() if value.dtype == torch.bfloat16 else value).numpy() for name, value in state.items()
    }
    document = {wrapped_in: arrays, "__author__": "vitrail"} if wrapped_in else arrays
    return pickle.dumps(document, protocol=4)


def as_tensors(found: Any) -> Any:
    """Arrays within mappings as tensors."""
    if isinstance(found, Mapping):
        return {name: as_tensors(value) for name, value in found.items()}
    return torch.from_numpy(np.array(found)) if isinstance(found, np.ndarray) else found


class _ArrayKind:
    """Stands for numpy's class, which a pickle only has to name."""


def _array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An empty array that pickle fills by `ndarray.__setstate__`."""
    if kind is not _ArrayKind:
        raise ForbiddenObject(str(kind))
    return np.ndarray((0,), np.uint8)


def _dtype(text: Any, *flags: Any) -> np.dtype[Any]:
    """Of numbers only: an array of Python objects would hold anything."""
    dtype: np.dtype[Any] = np.dtype(text, False, True)  # a copy: its byte order is set afterwards
    if dtype.kind not in "biuf":
        raise ForbiddenObject(f"an array of {dtype}")
    return dtype


def _scalar(dtype: np.dtype[Any], content: Any) -> Any:
    data = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(data, dtype)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise ForbiddenObject(f"a text in {encoding}")
    return text.encode("latin1")
