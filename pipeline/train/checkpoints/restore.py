"""Reading saved state back: on any number of ranks to go on with a run, or as consolidated weights.

`pipeline.train.checkpoints.saving` writes what is read here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline import ranks, storage
from pipeline.convert.files import read_header
from pipeline.errors import CheckpointError, StorageError
from pipeline.train.checkpoints import commits as committed
from pipeline.train.checkpoints import fragments as fmt
from pipeline.train.checkpoints.commits import Commit
from pipeline.train.checkpoints.fragments import Damaged, Gathered
from pipeline.train.engine.base import Fragment, Read, Span, TensorFacts

SOURCES = "give a run directory with a finished checkpoint, a checkpoint folder or a safetensors file"
Which = Literal["auto", "ema", "raw"]
WHICH: dict[str, Which] = {"auto": "auto", "ema": "ema", "raw": "raw"}

log = logging.getLogger("vitrail")


class LoadedCheckpoint(NamedTuple):
    """A checkpoint whose parts a rank wants are in its host memory, verified."""

    commit: Commit
    read: Read


def load(commit: Commit, wanted: Sequence[Span]) -> Gathered:
    """Read what covers `wanted` into host memory and verify it.

    Tables are read beginning with this rank's own number, and no further than needed: on the same layout that is one.

    Raises:
        Damaged: something is missing or altered.
    """
    files = {file["name"]: file for file in commit.document["files"]}
    tables = sorted(name for name in files if name.endswith(".table.json"))
    here = ranks.world().rank % max(1, len(tables))
    by_name: dict[str, list[Span]] = {}
    for span in wanted:
        by_name.setdefault(span.name, []).append(span)
    missing: Sequence[Span] = wanted
    rows: list[fmt.Row] = []
    fragments: list[Fragment] = []
    for name in [*tables[here:], *tables[:here]]:
        if not missing:
            break
        file, own = fmt.parse_table(_read(commit, name), files[name]["sha256"])
        needed = [row for row in own if fmt.overlaps(row, by_name)]
        fragments += fmt.fetch_rows(needed, _reader(commit, file))
        rows += needed
        missing = fmt.uncovered(missing, rows)
    if missing:
        raise Damaged(f"{missing[0].name} isn't in the checkpoint")
    return Gathered(fragments)


def load_newest(
    url: str,
    wanted: Sequence[Span],
    known: Mapping[str, TensorFacts],
    at_most: int | None = None,
    *,
    accept: Callable[[Commit], None] = lambda commit: None,
) -> LoadedCheckpoint | None:
    """The newest commit that every rank can read and verify what it wants of; None when there are no checkpoints.

    Collective; nothing is applied yet. What is skipped is logged with the reason.

    Args:
        url: the checkpoints folder; another run's directory or one checkpoint serve too.
        wanted: what this rank reads.
        known: the tensors the model has, to tell a checkpoint of another model from a damaged one.
        at_most: the newest step that will do; then None also if all are newer.
        accept: raises UserError for a checkpoint that must not be gone on with, from what its commit tells.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    found = ranks.from_first(lambda: _found_at(url))
    skipped = list(found.skipped)
    for commit in found.commits:
        if at_most is not None and commit.step > at_most:
            continue
        accept(commit)
        _check_model(commit, known)
        gathered: Gathered | None = None
        reason, refusal = "", None
        try:
            gathered = load(commit, wanted)
        except (Damaged, FileNotFoundError, ValueError, KeyError) as error:
            reason = str(error) or repr(error)
        except StorageError as error:  # it may be whole, only out of reach: falling back would throw work away
            refusal = error
        answers = ranks.gather((reason, refusal))
        for _, theirs in answers:
            if theirs is not None:
                raise theirs
        reasons = [text for text, _ in answers if text]
        if not reasons:
            assert gathered is not None
            _log_skipped(skipped)
            return LoadedCheckpoint(commit, gathered.read)
        skipped.append(f"step {commit.step} of attempt {commit.attempt}: {reasons[0]}")
    _log_skipped(skipped)
    if skipped and at_most is None:
        raise CheckpointError(
            f"no checkpoint can be used ({'; '.join(skipped)})",
            where=url,
            fix="restore the files, or delete the folder to start over",
        )
    return None


class SavedWeights(NamedTuple):
    """Consolidated weights (fp32) and buffers, in host memory."""

    tensors: dict[str, Tensor]
    which: Literal["ema", "raw"]  # the moving average, or the weights as trained
    url: str  # the checkpoint they come from
    step: int  # 0 for a bare file
    info: Mapping[str, Any]  # what the run told of itself, {} for a bare file

    def describe(self) -> str:
        """For people: which weights of which step."""
        kind = "moving average of the weights" if self.which == "ema" else "weights"
        return f"{kind} at step {self.step}" if self.info else "weights of the file"


def read_weights(url: str, which: Which = "auto") -> dict[str, Tensor]:
    """The tensors of `read_saved`."""
    return read_saved(url, which).tensors


def read_saved(url: str, which: Which = "auto") -> SavedWeights:
    """Weights of the newest valid checkpoint at `url`.

    Args:
        url: a run directory, its checkpoints folder, one checkpoint, or a safetensors file.
        which: "ema" for the moving average, "raw" for the weights as trained, "auto" for the average where the run
            keeps one; buffers and frozen parameters that have no average are as they are.

    Raises:
        CheckpointError: there are none, or no valid ones, or no moving average though it was asked for.
    """
    if url.endswith(".safetensors"):
        import safetensors.torch

        return SavedWeights(safetensors.torch.load(storage.read(url)), "raw", url, 0, {})
    skipped: list[str] = []
    for commit in _commits_at(url, skipped):
        info = commit.document.get("info", {})
        if which == "ema" and not info.get("ema"):
            raise CheckpointError(
                "the run keeps no moving average of its weights", where=url, fix="ask for the raw weights"
            )
        kind: Literal["ema", "raw"] = "ema" if info.get("ema") and which != "raw" else "raw"
        try:
            saved = SavedWeights(_consolidated(commit, kind), kind, commit.url, commit.step, info)
        except (Damaged, FileNotFoundError, ValueError, KeyError) as error:
            skipped.append(f"step {commit.step}: {error}")
            continue
        _log_skipped(skipped)
        return saved
    _log_skipped(skipped)
    raise CheckpointError(
        f"no valid checkpoint ({'; '.join(skipped)})" if skipped else "no checkpoint",
        where=url,
        fix=SOURCES,
    )


def read_info(url: str) -> dict[str, Any]:
    """What the newest commit at `url` (as for `read_weights`) tells of the run that made it; of a file of ours its
    `stage`, `options` and `classes`, {} for any other.
    """
    if url.endswith(".safetensors"):
        return read_header(url)
    newest = next(iter(_commits_at(url, [])), None)
    return {} if newest is None else dict(newest.document.get("info", {}))


def read_state(url: str) -> dict[str, Fragment]:
    """Everything the newest valid checkpoint at `url` (as for `read_saved`) holds, by tensor: canonical, the same
    whatever ZeRO stage, world size and precision it was saved at.

    Each is one fragment over the whole tensor: the fp32 value, the optimizer's moments, the moving average, and the
    group's settings.

    Raises:
        CheckpointError: there are none, or no valid ones.
    """
    skipped: list[str] = []
    for commit in _commits_at(url, skipped):
        try:
            gathered = _gathered(commit, lambda row: row)
            sizes = {name: torch.Size(facts["shape"]).numel() for name, facts in commit.document["tensors"].items()}
            return {name: gathered.read(name, 0, size) for name, size in sizes.items()}
        except (Damaged, FileNotFoundError, ValueError, KeyError) as error:
            skipped.append(f"step {commit.step}: {error}")
    raise CheckpointError(f"no valid checkpoint ({'; '.join(skipped) or 'none at all'})", where=url, fix=SOURCES)


def damage_of(commit: Commit) -> str:
    """What is wrong with a checkpoint's files when all of them are read; "" for nothing."""
    try:
        _gathered(commit, lambda row: row)
    except (Damaged, FileNotFoundError, ValueError, KeyError) as error:
        return str(error) or repr(error)
    return ""


def state_digest(state: Mapping[str, Fragment]) -> str:
    """sha256 of a whole state: every tensor's name, type and bits, and its group's settings."""
    total = hashlib.sha256()
    for name in sorted(state):
        fragment = state[name]
        total.update(f"{name} {sorted(fragment.group.items())!r}\n".encode())
        for key in sorted(fragment.tensors):
            value = fragment.tensors[key].contiguous()
            total.update(f"{key} {value.dtype} {value.numel()}\n".encode())
            total.update(value.view(torch.uint8).numpy().data)
    return total.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 of names, types, shapes and values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().contiguous().cpu()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _found_at(url: str) -> committed.Found:
    skipped: list[str] = []
    commits = _commits_at(url, skipped)
    return committed.Found(commits, skipped)


def _commits_at(url: str, skipped: list[str]) -> list[Commit]:
    """Commits at a run directory, a checkpoints folder or a single checkpoint, newest first."""
    try:
        commit, reason = committed.read_commit(url)
        skipped += [f"{url}: {reason}"] if reason else []
        return [commit] if commit is not None else []
    except FileNotFoundError:
        pass
    places = [storage.join(url, "checkpoints"), url]
    try:
        elsewhere = json.loads(storage.read(storage.join(url, "status.json"))).get("checkpoints")
        places[:0] = [elsewhere] if elsewhere else []
    except (FileNotFoundError, ValueError):
        pass
    for place in places:
        found = committed.find_commits(place)
        skipped += found.skipped
        if found.commits or found.skipped:
            return found.commits
    return []


def _consolidated(commit: Commit, which: Literal["ema", "raw"]) -> dict[str, Tensor]:
    gathered = _gathered(commit, lambda row: _only(row, which))
    weights = {}
    for name, facts in commit.document["tensors"].items():
        shape = torch.Size(facts["shape"])
        weights[name] = gathered.read(name, 0, shape.numel()).tensors["value"].view(shape)
    return weights


def _gathered(commit: Commit, wanted: Callable[[fmt.Row], fmt.Row]) -> Gathered:
    """All fragments of a checkpoint, verified; `wanted` may drop some of a row's tensors."""
    files = {file["name"]: file for file in commit.document["files"]}
    fragments: list[Fragment] = []
    for name in sorted(name for name in files if name.endswith(".table.json")):
        file, rows = fmt.parse_table(_read(commit, name), files[name]["sha256"])
        fragments += fmt.fetch_rows([wanted(row) for row in rows], _reader(commit, file))
    return Gathered(fragments)


def _only(row: fmt.Row, which: Literal["ema", "raw"]) -> fmt.Row:
    """The row with its value alone, or with its average in the place of the value."""
    places = {place.key: (place, digest) for place, digest in row.places}
    place, digest = places.get("ema", places["value"]) if which == "ema" else places["value"]
    return row._replace(places=[(place._replace(key="value"), digest)])


def _check_model(commit: Commit, known: Mapping[str, TensorFacts]) -> None:
    theirs = {name: tuple(facts["shape"]) for name, facts in commit.document["tensors"].items()}
    ours = {name: tuple(facts.shape) for name, facts in known.items()}
    odd = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if odd:
        raise CheckpointError(
            f"the checkpoint holds another model: {len(odd)} tensors differ, {odd[0]} among them "
            f"({_shape(theirs.get(odd[0]))} there, {_shape(ours.get(odd[0]))} here)",
            where=commit.url,
            fix="give the run a new name, or go back to the code, configuration and data that wrote it",
        )


def _shape(shape: Sequence[int] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a single number"


def _reader(commit: Commit, file: str) -> Callable[[int, int], bytes]:
    path = storage.join(commit.url, file)
    return lambda start, stop: storage.read_range(path, start, stop)


def _read(commit: Commit, name: str) -> bytes:
    return storage.read(storage.join(commit.url, name))


def _log_skipped(skipped: Sequence[str]) -> None:
    if ranks.world().rank == 0:
        for line in skipped:
            log.warning("checkpoint skipped: %s", line)
