"""Reading saved state back: to continue a run on any number of ranks, or as consolidated weights.

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
from pipeline.train.checkpoints import fragments as fmt
from pipeline.train.checkpoints.commits import Commit, FoundCommits, find_commits, read_commit
from pipeline.train.checkpoints.fragments import Damaged, LoadedFragments, StoredFragment
from pipeline.train.engine.base import Fragment, Read, Span, TensorFacts

SOURCES = "give a run directory with a finished checkpoint, a checkpoint folder or a safetensors file"
Which = Literal["auto", "ema", "raw"]
WHICH: dict[str, Which] = {"auto": "auto", "ema": "ema", "raw": "raw"}

log = logging.getLogger("vitrail")


class LoadedCheckpoint(NamedTuple):
    """A checkpoint of which everything that this rank wants is in host memory, and verified."""

    commit: Commit
    read: Read


def load(commit: Commit, wanted: Sequence[Span]) -> LoadedFragments:
    """Read what covers `wanted` into host memory and verify it.

    Tables are read from this rank's number on, and no more than needed: only one if ranks and ZeRO stage are the same.

    Raises:
        Damaged: something is missing or altered.
    """
    files = {file["name"]: file for file in commit.document["files"]}
    tables = sorted(name for name in files if name.endswith(".table.json"))
    first = ranks.world().rank % max(1, len(tables))
    by_name: dict[str, list[Span]] = {}
    for span in wanted:
        by_name.setdefault(span.name, []).append(span)
    missing: Sequence[Span] = wanted
    read: list[StoredFragment] = []
    fragments: list[Fragment] = []
    for name in [*tables[first:], *tables[:first]]:
        if not missing:
            break
        file, stored = fmt.parse_table(_read(commit, name), files[name]["sha256"])
        needed = [fragment for fragment in stored if fmt.overlaps(fragment, by_name)]
        fragments += fmt.fetch(needed, _reader(commit, file))
        read += needed
        missing = fmt.uncovered(missing, read)
    if missing:
        raise Damaged(f"{missing[0].name} isn't in the checkpoint")
    return LoadedFragments(fragments)


def load_newest(
    url: str,
    wanted: Sequence[Span],
    known: Mapping[str, TensorFacts],
    at_most: int | None = None,
    *,
    accept: Callable[[Commit], None] = lambda commit: None,
) -> LoadedCheckpoint | None:
    """The newest checkpoint of which every rank can read and verify what it wants; None when there are no checkpoints.

    Collective; nothing is applied yet. Checkpoints that are skipped are logged with the reason.

    Args:
        url: the checkpoints folder, a run directory, or one checkpoint.
        wanted: what this rank reads.
        known: the tensors of the model, to tell a checkpoint of another model from a damaged one.
        at_most: the newest step that will do; then None also if all are newer.
        accept: raises UserError for a checkpoint that must not be continued, going by its commit.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    commits, skipped = ranks.from_first(lambda: _commits_at(url))
    for commit in commits:
        if at_most is not None and commit.step > at_most:
            continue
        accept(commit)
        _check_model(commit, known)
        fragments, damage = _load_on_all_ranks(commit, wanted)
        if fragments is not None:
            _log_skipped(skipped)
            return LoadedCheckpoint(commit, fragments.read)
        skipped.append(f"step {commit.step} of attempt {commit.attempt}: {damage}")
    _log_skipped(skipped)
    if skipped and at_most is None:
        raise CheckpointError(
            f"no checkpoint can be used ({'; '.join(skipped)})",
            where=url,
            fix="restore the files, or delete the folder to start over",
        )
    return None


def _load_on_all_ranks(commit: Commit, wanted: Sequence[Span]) -> tuple[LoadedFragments | None, str]:
    """`load` on every rank; None, and what is damaged, if it is for some rank. Collective.

    Raises:
        StorageError: some rank can't reach the checkpoint, which may be whole: falling back would throw work away.
    """
    fragments: LoadedFragments | None = None
    damage, unreachable = "", None
    try:
        fragments = load(commit, wanted)
    except (Damaged, FileNotFoundError, ValueError, KeyError) as error:
        damage = str(error) or repr(error)
    except StorageError as error:
        unreachable = error
    answers = ranks.gather((damage, unreachable))
    for _, error_of_rank in answers:
        if error_of_rank is not None:
            raise error_of_rank
    damages = [damage_of_rank for damage_of_rank, _ in answers if damage_of_rank]
    return (None, damages[0]) if damages else (fragments, "")


class SavedWeights(NamedTuple):
    """Consolidated weights (fp32) and buffers, in host memory."""

    tensors: dict[str, Tensor]
    which: Literal["ema", "raw"]  # the moving average, or the weights as trained
    url: str  # the checkpoint they come from
    step: int  # 0 for a bare file
    info: Mapping[str, Any]  # what the checkpoint says about its run, {} for a bare file

    def describe(self) -> str:
        """Which weights of which step, for people."""
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
            keeps one; buffers and frozen parameters that have no average are read as they are.

    Raises:
        CheckpointError: there are none, or no valid ones, or no moving average though `which` is "ema".
    """
    if url.endswith(".safetensors"):
        import safetensors.torch

        return SavedWeights(safetensors.torch.load(storage.read(url)), "raw", url, 0, {})
    commits, skipped = _commits_at(url)
    for commit in commits:
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
    """What the newest commit at `url` (as for `read_weights`) says about its run: `RunSetup.checkpoint_info`. Of a file
    that `vitrail convert` wrote: `stage`, `options` and `classes`; of any other: {}.
    """
    if url.endswith(".safetensors"):
        return read_header(url)
    commits, _ = _commits_at(url)
    return dict(commits[0].document.get("info", {})) if commits else {}


def read_state(url: str) -> dict[str, Fragment]:
    """Everything in the newest valid checkpoint at `url` (as for `read_saved`), by the name of the parameter or buffer.

    The result doesn't depend on the ZeRO stage, world size and precision that the checkpoint was saved with. Each value
    is one fragment over the whole tensor: the fp32 value, the optimizer's moments, the moving average, and the group's
    settings.

    Raises:
        CheckpointError: there are none, or no valid ones.
    """
    commits, skipped = _commits_at(url)
    for commit in commits:
        try:
            fragments = _read_all(commit)
            sizes = {name: torch.Size(facts["shape"]).numel() for name, facts in commit.document["tensors"].items()}
            return {name: fragments.read(name, 0, size) for name, size in sizes.items()}
        except (Damaged, FileNotFoundError, ValueError, KeyError) as error:
            skipped.append(f"step {commit.step}: {error}")
    raise CheckpointError(f"no valid checkpoint ({'; '.join(skipped) or 'none at all'})", where=url, fix=SOURCES)


def damage_of(commit: Commit) -> str:
    """Read all of a checkpoint's files; what is wrong with them, "" for nothing."""
    try:
        _read_all(commit)
    except (Damaged, FileNotFoundError, ValueError, KeyError) as error:
        return str(error) or repr(error)
    return ""


def state_digest(state: Mapping[str, Fragment]) -> str:
    """sha256 of a whole state: name, type and bits of every tensor, and the settings of its group."""
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
    """sha256 of weights: names, types, shapes and values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().contiguous().cpu()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _commits_at(url: str) -> FoundCommits:
    """Commits at a run directory, a checkpoints folder or a single checkpoint, newest first."""
    try:
        commit, reason = read_commit(url)
        return FoundCommits([], [f"{url}: {reason}"]) if commit is None else FoundCommits([commit], [])
    except FileNotFoundError:
        pass
    folders = [storage.join(url, "checkpoints"), url]
    try:
        recorded = json.loads(storage.read(storage.join(url, "status.json"))).get("checkpoints")
        folders[:0] = [recorded] if recorded else []
    except (FileNotFoundError, ValueError):
        pass
    for folder in folders:
        commits, skipped = find_commits(folder)
        if commits or skipped:
            return FoundCommits(commits, skipped)
    return FoundCommits([], [])


def _consolidated(commit: Commit, which: Literal["ema", "raw"]) -> dict[str, Tensor]:
    fragments = _read_all(commit, lambda fragment: _value_alone(fragment, which))
    weights = {}
    for name, facts in commit.document["tensors"].items():
        shape = torch.Size(facts["shape"])
        weights[name] = fragments.read(name, 0, shape.numel()).tensors["value"].view(shape)
    return weights


def _read_all(
    commit: Commit, select: Callable[[StoredFragment], StoredFragment] = lambda fragment: fragment
) -> LoadedFragments:
    """All fragments of a checkpoint, verified; `select` may drop some of a fragment's tensors."""
    files = {file["name"]: file for file in commit.document["files"]}
    fragments: list[Fragment] = []
    for name in sorted(name for name in files if name.endswith(".table.json")):
        file, stored = fmt.parse_table(_read(commit, name), files[name]["sha256"])
        fragments += fmt.fetch([select(fragment) for fragment in stored], _reader(commit, file))
    return LoadedFragments(fragments)


def _value_alone(fragment: StoredFragment, which: Literal["ema", "raw"]) -> StoredFragment:
    """The fragment with its value alone, or with its moving average as the value."""
    tensors = {stored.key: (stored, digest) for stored, digest in fragment.tensors}
    stored, digest = tensors.get("ema", tensors["value"]) if which == "ema" else tensors["value"]
    return fragment._replace(tensors=[(stored._replace(key="value"), digest)])


def _check_model(commit: Commit, known: Mapping[str, TensorFacts]) -> None:
    saved = {name: tuple(facts["shape"]) for name, facts in commit.document["tensors"].items()}
    current = {name: tuple(facts.shape) for name, facts in known.items()}
    differing = sorted(name for name in {*saved, *current} if saved.get(name) != current.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"the checkpoint holds another model: {len(differing)} tensors differ, {name} among them "
            f"({_shape(saved.get(name))} in the checkpoint, {_shape(current.get(name))} in the model)",
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
