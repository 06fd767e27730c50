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


class ForbiddenObject(pickle.UnpicklingError):
    """The pickle asks for something other than plain containers and arrays."""


class _Unpickler(pickle.Unpickler):
    """Builds containers, numbers, texts and arrays of numbers; whatever else is asked for, even by name, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core.", "numpy.core.").replace("__builtin__", "builtins")
        if (module, name) not in _ALLOWED:
            raise ForbiddenObject(f"{module}.{name}")
        return _ALLOWED[module, name]

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


def as_tensors(document: Any) -> Any:
    """Arrays within mappings as tensors."""
    if isinstance(document, Mapping):
        return {name: as_tensors(value) for name, value in document.items()}
    if not isinstance(document, np.ndarray):
        return document
    return torch.from_numpy(np.array(document, document.dtype.newbyteorder("=")))


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


def _nothing() -> bytes:
    """How protocol 2 writes no bytes."""
    return b""


def _from_buffer(content: Any, dtype: np.dtype[Any], shape: Any, order: str) -> np.ndarray:
    """How protocol 5 writes an array."""
    return np.frombuffer(content, dtype).reshape(shape, order="F" if order == "F" else "C")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _ArrayKind,
    ("numpy", "dtype"): _dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _nothing,
}
