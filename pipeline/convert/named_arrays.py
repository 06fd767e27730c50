"""Arrays by name as JAX projects keep them: .npz files, and t5x's folders of zarr arrays; nothing is unpickled."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import storage
from pipeline.errors import CheckpointError

ZARRAY = "/.zarray"
TARGET = "target."  # what t5x puts before the names of parameters
ARCHIVE = ".npz"


def read_arrays(url: str) -> dict[str, Tensor] | None:
    """The arrays of an .npz file or of a t5x folder, by name; None when it is neither.

    Raises:
        CheckpointError: it is damaged, or compressed in a way that isn't known.
    """
    if url.endswith(ARCHIVE):
        try:
            with np.load(io.BytesIO(storage.read(url)), allow_pickle=False) as archive:
                return {name: torch.from_numpy(np.ascontiguousarray(archive[name])) for name in archive.files}
        except FileNotFoundError:
            raise CheckpointError("no such file", where=url, fix="check the path") from None
        except (ValueError, OSError, KeyError, zlib.error) as error:
            raise CheckpointError(f"no readable .npz ({error})", where=url, fix="fetch it again") from None
    names = _zarr_names(url)
    return {name: _zarr_array(storage.join(url, name)) for name in names} if names else None


def dump_archive(state: Mapping[str, Tensor]) -> bytes:
    """An .npz file."""
    content = io.BytesIO()
    arrays: Any = {name: value.float().cpu().numpy() for name, value in state.items()}
    np.savez(content, **arrays)
    return content.getvalue()


def _zarr_names(url: str) -> list[str]:
    """Folders of a t5x checkpoint that hold parameters."""
    try:
        entries = [entry.url.removeprefix(url.rstrip("/") + "/") for entry in storage.entries(url)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    arrays = {entry.removesuffix(ZARRAY) for entry in entries if entry.endswith(ZARRAY)}
    return sorted(name for name in arrays if name.startswith(TARGET))


def _zarr_array(url: str) -> Tensor:
    """One array of zarr version 2, put together from its chunks."""
    header = json.loads(storage.read(storage.join(url, ".zarray")))
    shape, chunks, compressor = header["shape"], header["chunks"], header.get("compressor") or {}
    kind = str(header["dtype"])
    if compressor.get("id") not in (None, "gzip", "zlib") or header.get("order", "C") != "C" or kind[0] not in "<|":
        raise CheckpointError(
            f"arrays of type {kind} compressed by {compressor.get('id')}",
            where=url,
            fix="save them uncompressed or by gzip, row by row",
        )
    array = np.zeros(shape, dtype=np.dtype(kind))
    separator = header.get("dimension_separator", ".")
    for place in np.ndindex(*(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))):
        try:
            content = storage.read(storage.join(url, separator.join(map(str, place)) or "0"))
        except FileNotFoundError:
            raise CheckpointError(f"chunk {place} is missing", where=url, fix="fetch the checkpoint again") from None
        if compressor:
            content = gzip.decompress(content) if compressor["id"] == "gzip" else zlib.decompress(content)
        chunk = np.frombuffer(content, dtype=array.dtype).reshape(chunks)
        where = tuple(
            slice(i * size, min((i + 1) * size, full)) for i, size, full in zip(place, chunks, shape, strict=True)
        )
        array[where] = chunk[tuple(slice(0, part.stop - part.start) for part in where)]
    return torch.from_numpy(array)
