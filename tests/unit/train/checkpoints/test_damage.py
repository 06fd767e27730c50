"""Truncation, a flipped bit, deletion and lost permission of every file of a checkpoint: never is garbage loaded."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.errors import CheckpointError, StorageError, UserError
from pipeline.train.checkpoints.commits import find_commits
from pipeline.train.checkpoints.restore import load_newest, read_state, read_weights, state_digest
from pipeline.train.engine.base import Fragment, Span, TensorFacts
from tests.support import portability_cases as cases
from tests.support.process_group import ProcessGroup

HARMS = ("truncate", "empty", "flip", "delete", "forbid")
NOBODY = 65534


class Saved(NamedTuple):
    """Checkpoints of steps 3 and 6 by two ranks, and the digests of what they hold."""

    folder: Path
    digests: dict[int, str]
    names: list[str]
    facts: dict[str, TensorFacts]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, two: ProcessGroup) -> Saved:
    folder = tmp_path_factory.mktemp("whole")
    two.run(cases.two_checkpoints, str(folder / "checkpoints"))
    commits = find_commits(str(folder / "checkpoints")).commits
    assert [c.step for c in commits] == [6, 3]
    facts = {name: TensorFacts(**described) for name, described in commits[0].document["tensors"].items()}
    digests = {c.step: state_digest(read_state(c.url)) for c in commits}
    names = sorted(path.name for path in Path(commits[0].url).iterdir())
    assert len(names) == 2 * 3 + 1
    return Saved(folder / "checkpoints", digests, names, facts)


@pytest.fixture
def copy(saved: Saved) -> Iterator[Path]:
    """A copy that anyone may read."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(shutil.copytree(saved.folder, Path(folder) / "checkpoints"))


def harm(path: Path, how: str, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "forbid":
        path.chmod(0)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncate":
        path.write_bytes(data[: draw.randrange(1, len(data))])
    else:
        # Of the data file the tail: nothing of ours reads safetensors' own header, which only others need.
        first = len(data) // 2 if path.suffix == ".safetensors" else 0
        data[draw.randrange(first, len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user whom permissions bind: root reads everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def loaded(url: str, facts: dict[str, TensorFacts]) -> tuple[int, str] | UserError:
    """The step that a run would resume, and the digest of what it would get; or why it stops."""
    sizes = {name: math.prod(tensor.shape) for name, tensor in facts.items()}
    try:
        checkpoint = load_newest(url, [Span(name, 0, size) for name, size in sizes.items()], facts)
    except (CheckpointError, StorageError) as error:
        return error
    assert checkpoint is not None, "a run that has checkpoints was about to start over"
    commit, read = checkpoint
    assert commit.progress == {"step": commit.step, "samples": commit.step * cases.GLOBAL_BATCH}
    state: dict[str, Fragment] = {name: read(name, 0, size) for name, size in sizes.items()}
    return commit.step, state_digest(state)


@pytest.mark.parametrize("how", HARMS)
def test_each_file_of_the_newest_checkpoint(saved: Saved, copy: Path, how: str) -> None:
    outcomes = {}
    for number, name in enumerate(saved.names):
        shutil.rmtree(copy)
        shutil.copytree(saved.folder, copy)
        newest = Path(find_commits(str(copy)).commits[0].url)
        harm(newest / name, how, random.Random(number))
        with without_rights():
            outcome = loaded(str(copy), saved.facts)
        if isinstance(outcome, UserError):
            assert how == "forbid", f"{how} {name}: {outcome}"
            assert "permission" in str(outcome)
            outcomes[name] = "refused"
        else:
            step, digest = outcome
            assert digest == saved.digests[step], f"{how} {name}: garbage was loaded"
            outcomes[name] = f"step {step}"
    data = [name for name in saved.names if "receipt" not in name]
    assert {outcomes[name] for name in data} == {"refused" if how == "forbid" else "step 3"}, outcomes
    assert {outcomes[name] for name in saved.names if "receipt" in name} == {"step 6"}, "the commit holds the receipts"


@pytest.mark.parametrize("how", ["truncate", "flip", "delete"])
def test_weights_too(saved: Saved, copy: Path, how: str) -> None:
    expected = {c.step: read_weights(c.url) for c in find_commits(str(saved.folder)).commits}
    newest = Path(find_commits(str(copy)).commits[0].url)
    for number, name in enumerate(name for name in saved.names if name.endswith((".safetensors", ".table.json"))):
        shutil.copytree(saved.folder, copy, dirs_exist_ok=True)
        harm(newest / name, how, random.Random(99 + number))
        weights = read_weights(str(copy))
        same = [s for s, theirs in expected.items() if all((weights[n] == theirs[n]).all() for n in theirs)]
        assert same, f"{how} {name}: weights of no step"


def test_files_of_two_checkpoints_mixed_up(saved: Saved, copy: Path) -> None:
    newest, older = (Path(c.url) for c in find_commits(str(copy)).commits)
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        shutil.copy(older / name, newest / name)
    outcome = loaded(str(copy), saved.facts)
    assert outcome == (3, saved.digests[3])


def test_no_flipped_bit_of_a_commit_goes_unnoticed(saved: Saved, copy: Path) -> None:
    """The commit holds the progress: samples seen, the cursor, counters."""
    newest = Path(find_commits(str(copy)).commits[0].url) / "commit.json"
    whole = newest.read_bytes()
    for at in range(0, len(whole), 41):
        changed = bytearray(whole)
        changed[at] ^= 1 << (at % 8)
        newest.write_bytes(changed)
        assert [c.step for c in find_commits(str(copy)).commits] == [3], (at, changed[at - 20 : at + 20])


def test_a_rank_that_can_not_write_does_not_hold_up_the_others(tmp_path: Path, two: ProcessGroup) -> None:
    """Rank 0, which waits for the parts of all, learns of it with the next save."""
    url = str(tmp_path / "checkpoints")
    for num_failed, last_failure, seconds in two.run(cases.save_where_rank_1_cannot, url):
        assert (num_failed, last_failure) == (1, "")
        assert seconds < 60, "the deadline for parts is 900 s"
    assert [c.step for c in find_commits(url).commits] == [2]
