"""Weight files, read without executing anything in them.

Pickles go through torch's restricted unpickler (`weights_only=True`), or for numpy arrays through our own, which build
tensors and plain containers and refuse everything else; safetensors and JSON hold no code to begin with.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline import storage
from pipeline.config import Document
from pipeline.convert.arrays import ForbiddenObject, as_tensors, dump_arrays, load_arrays
from pipeline.convert.named_arrays import ARCHIVE, dump_archive, read_arrays
from pipeline.convert.weights import Format, WeightFile, Written, listed
from pipeline.errors import CheckpointError, ConfigError, StorageError

ARRAYS = ".pkl"
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ARRAYS)
SAFETENSORS = ".safetensors"
WHOLE_FOLDER = ("model.safetensors", "pytorch_model.bin")
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
WRAPPERS = ("model", "state_dict")  # keys that training scripts keep the tensors under
METADATA_KEY = "vitrail"
MAX_HEADER_BYTES = 10**8  # safetensors' own limit


def read_source(url: str, form: Format) -> WeightFile:
    """Read a weight file, or a folder as `save_pretrained` leaves it, with the format's configuration beside it.

    Raises:
        CheckpointError: there is none, it is damaged or truncated, or it holds code or no tensors.
    """
    config = form.config_file or CONFIG
    if form.named_arrays and (arrays := read_arrays(url)) is not None:
        return WeightFile(url, arrays, {})
    if url.endswith((SAFETENSORS, *PICKLES)):
        state, metadata = _read_file(url)
        beside = url.rpartition("/")[0]
        return WeightFile(url, state, {**_config(storage.join(beside, config) if beside else config), **metadata})
    for name in (*form.folder_files, *WHOLE_FOLDER):
        if storage.exists(storage.join(url, name)):
            state, metadata = _read_file(storage.join(url, name))
            return WeightFile(url, state, {**_config(storage.join(url, config)), **metadata})
    if storage.exists(storage.join(url, INDEX)):
        return WeightFile(url, _read_shards(url), _config(storage.join(url, config)))
    raise CheckpointError(
        "no weights there",
        where=url,
        fix=f"give a file ({', '.join((SAFETENSORS, *PICKLES))}) or a folder with {' or '.join(WHOLE_FOLDER)}",
    )


def write_target(url: str, written: Written, form: Format) -> list[str]:
    """Write weights to a file, of the kind its ending says, or to a folder. Returns what was written.

    Raises:
        ConfigError: the ending says neither.
        StorageError: the place can't be written.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in written.state.items()}
    if url.endswith(SAFETENSORS):
        storage.write(url, _safetensors(state, written.config))
        return [url]
    if url.endswith(ARCHIVE) and form.named_arrays:
        storage.write(url, dump_archive(state))
        return [url]
    if url.endswith(ARRAYS) and form.arrays:
        storage.write(url, dump_arrays(state, form.wrapped_in))
        return [url]
    if url.endswith(PICKLES) and not url.endswith(ARRAYS) and form.pickles:
        content = io.BytesIO()
        torch.save({form.wrapped_in: state} if form.wrapped_in else state, content)
        storage.write(url, content.getvalue())
        return [url]
    if form.config_file is None or ("." in url.rpartition("/")[2] and not url.endswith("/")):
        pickles = [end for end in PICKLES if (form.arrays if end == ARRAYS else form.pickles)]
        kinds = ", ".join((SAFETENSORS, *pickles))
        raise ConfigError(
            f"its ending is of no kind of file that format {form.name!r} has",
            where=url,
            fix=f"write to {kinds}" + (" or a folder (name/)" if form.config_file else ""),
        )
    weights = storage.join(url, (*form.folder_files, *WHOLE_FOLDER)[0])
    config = storage.join(url, form.config_file)
    storage.write(weights, _safetensors(state, {}))
    storage.write(config, (json.dumps(written.config, indent=2) + "\n").encode())
    return [weights, config]


def read_header(url: str) -> Document:
    """The metadata of a safetensors file of ours (`stage`, `options`, `classes`), without reading the tensors; {} for
    any other file.
    """
    try:
        length = int.from_bytes(storage.read_range(url, 0, 8), "little")
        return _metadata(storage.read_range(url, 0, 8 + length)) if length <= MAX_HEADER_BYTES else {}
    except (FileNotFoundError, ValueError, AttributeError):  # reading the weights will raise what is wrong
        return {}


def _safetensors(state: Mapping[str, Tensor], config: Document) -> bytes:
    metadata = {"format": "pt"} | ({METADATA_KEY: json.dumps(config)} if config else {})
    return safetensors.torch.save(dict(state), metadata)


def _read_file(url: str) -> tuple[dict[str, Tensor], Document]:
    """Tensors of one file, and the configuration in it."""
    try:
        content = storage.read(url)
    except FileNotFoundError:
        raise CheckpointError("no such file", where=url, fix="check the path") from None
    if url.endswith(SAFETENSORS):
        try:
            return safetensors.torch.load(content), _metadata(content)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise _damaged(url, "safetensors", error) from None
    if url.endswith(ARRAYS):
        with _explained(url):
            arrays = as_tensors(load_arrays(content))
        return _tensors(arrays, url)
    with _explained(url), torch.serialization.safe_globals([argparse.Namespace]):
        document = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return _tensors(document, url)


def _metadata(content: bytes) -> Document:
    """What `_safetensors` wrote beside the tensors."""
    length = int.from_bytes(content[:8], "little")
    text = json.loads(content[8 : 8 + length]).get("__metadata__", {}).get(METADATA_KEY)
    document = json.loads(text) if text is not None else {}
    return document if isinstance(document, dict) else {}


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged pickle can fail in any way the unpickler can
        raise _damaged(url, "PyTorch", error) from None


def _damaged(url: str, kind: str, error: Exception) -> CheckpointError:
    words = " ".join(str(error).split()) or type(error).__name__
    if "Weights only load failed" in words or "Unsupported" in words or isinstance(error, ForbiddenObject):
        return CheckpointError(
            "it holds objects other than tensors, which could execute code when loaded",
            where=url,
            fix="take a file of tensors only, or safetensors; load this one nowhere unless you trust its source",
        )
    return CheckpointError(
        f"no readable {kind} file; it may be truncated ({words[:200]})", where=url, fix="fetch it again"
    )


def _tensors(document: Any, url: str) -> tuple[dict[str, Tensor], Document]:
    """The tensors of an unpickled object, and the training arguments beside them."""
    training_arguments: Document = {}
    if isinstance(document, Mapping):
        arguments = document.get("args")
        training_arguments = dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}
        document = next((document[key] for key in WRAPPERS if isinstance(document.get(key), Mapping)), document)
    tensors = {str(name): value for name, value in document.items()} if isinstance(document, Mapping) else {}
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if not tensors or others:
        what = f"{listed(others)} are no tensors" if others else "it holds no tensors by name"
        raise CheckpointError(what, where=url, fix="give a state dict, or a checkpoint with one under `model`")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors, training_arguments


def _read_shards(folder: str) -> dict[str, Tensor]:
    """A model that `save_pretrained` cut into several files."""
    index = storage.join(folder, INDEX)
    try:
        files = sorted(set(json.loads(storage.read(index))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, "index", error) from None
    if any(not isinstance(name, str) or "/" in name or not name.endswith(SAFETENSORS) for name in files):
        raise CheckpointError("it names files outside its folder", where=index, fix="fetch the folder again")
    state: dict[str, Tensor] = {}
    for name in files:
        state |= _read_file(storage.join(folder, name))[0]
    return state


def _config(url: str) -> Document:
    """The config.json beside weights; empty when there is none."""
    try:
        document = json.loads(storage.read(url))
    except FileNotFoundError:
        return {}
    except (ValueError, StorageError) as error:
        raise CheckpointError(f"not JSON ({error})", where=url, fix="fetch it again") from None
    if not isinstance(document, dict):
        raise CheckpointError("no JSON object", where=url, fix="fetch it again")
    return document
