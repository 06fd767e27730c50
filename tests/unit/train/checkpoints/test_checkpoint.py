"""The checkpoint's bytes, and the thread that writes them, in a world of one."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import CheckpointError, StorageError
from pipeline.train.checkpoints import commits, saving
from pipeline.train.checkpoints import fragments as fmt
from pipeline.train.checkpoints import restore as ck
from pipeline.train.engine.base import Fragment, Span, TensorFacts

VALUES = {"a": torch.arange(10.0), "b": torch.arange(6.0) * 0.5, "empty": torch.empty(0)}
FLAG = torch.tensor([True, False, True])


def fragments(cuts: dict[str, list[int]] | None = None) -> list[Fragment]:
    """All of VALUES and a flag, cut at the given places."""
    parts = []
    for name, value in VALUES.items():
        places = [0, *(cuts or {}).get(name, []), len(value)]
        for start, stop in itertools.pairwise(places):
            part = value[start:stop]
            parts.append(Fragment(name, start, stop, {"value": part, "exp_avg": part * 2}, {"lr": 0.1, "step": 3.0}))
    return [*parts, Fragment("flag", 0, 3, {"value": FLAG}, {})]


FACTS = {name: TensorFacts((len(value),), "parameter", "float32") for name, value in VALUES.items()}
FACTS["flag"] = TensorFacts((3,), "buffer", "bool")


def written(parts: list[Fragment]) -> tuple[bytes, bytes]:
    """Data file and table of one rank."""
    plan = fmt.lay_out(parts)
    buffer = torch.empty(plan.size_bytes + 7, dtype=torch.uint8)
    fmt.copy_to_host(parts, plan, buffer)
    data = buffer.numpy().data[: plan.size_bytes]
    labels = [(Span(f.name, f.start, f.stop), f.group) for f in parts]
    return bytes(data), fmt.table_of(labels, plan, data, "rank-00000.safetensors")


def rows_of(table: bytes) -> list[fmt.StoredFragment]:
    return fmt.parse_table(table, fmt._sha256(table))[1]


def test_the_file_is_safetensors() -> None:
    data, _ = written(fragments())
    loaded = safetensors.torch.load(data)
    assert torch.equal(loaded["a/0/value"], VALUES["a"])
    assert torch.equal(loaded["b/0/exp_avg"], VALUES["b"] * 2)
    assert torch.equal(loaded["flag/0/value"], FLAG)


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(1, 9), max_size=4, unique=True).map(sorted),
    span=st.tuples(st.integers(0, 10), st.integers(0, 10)).map(sorted),
)
def test_any_span_comes_back_whatever_the_cuts(cuts: list[int], span: list[int]) -> None:
    data, table = written(fragments({"a": cuts}))
    gathered = fmt.LoadedFragments(fmt.fetch(rows_of(table), lambda start, stop: data[start:stop]))
    start, stop = span
    fragment = gathered.read("a", start, stop)
    assert torch.equal(fragment.tensors["value"], VALUES["a"][start:stop])
    assert torch.equal(fragment.tensors["exp_avg"], VALUES["a"][start:stop] * 2)
    assert fragment.group == {"lr": 0.1, "step": 3.0}


def test_neighbours_are_read_in_one_request() -> None:
    data, table = written(fragments({"a": [3, 5]}))
    requests = []

    def read(start: int, stop: int) -> bytes:
        requests.append((start, stop))
        return data[start:stop]

    fmt.fetch(rows_of(table), read)
    assert len(requests) == 1
    assert requests[0][1] == len(data)


def test_every_flipped_bit_of_the_data_is_noticed() -> None:
    data, table = written(fragments())
    rows = rows_of(table)
    first = min(place.offset for row in rows for place, _ in row.tensors)
    for at in range(first, len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(fmt.Damaged, match="altered"):
            fmt.fetch(rows, lambda start, stop, changed=changed: bytes(changed[start:stop]))  # type: ignore[misc]


def test_what_is_missing_is_named() -> None:
    parts = [f for f in fragments({"a": [4]}) if (f.name, f.start) != ("a", 4)]
    data, table = written(parts)
    rows = rows_of(table)
    assert fmt.uncovered([Span("a", 0, 10), Span("b", 0, 6)], rows) == [Span("a", 0, 10)]
    gathered = fmt.LoadedFragments(fmt.fetch(rows, lambda start, stop: data[start:stop]))
    with pytest.raises(fmt.Damaged, match="parts of a"):
        gathered.read("a", 2, 6)
    with pytest.raises(fmt.Damaged, match="isn't in the checkpoint"):
        gathered.read("c", 0, 1)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(saving.time, "sleep", lambda _: None)
    return str(tmp_path / "checkpoints")


def begin(url: str, resumed: int = 0) -> saving.CheckpointWriter:
    attempt = commits.begin_attempt(url, resumed, enforced=True)
    assert attempt is not None
    return saving.CheckpointWriter(url, attempt, keep_last=2, keep_every_samples=None, info={"stage": "x"})


def save(checkpoints: saving.CheckpointWriter, step: int, parts: list[Fragment] | None = None) -> bool:
    return checkpoints.save(step, parts or fragments(), FACTS, {"step": step, "samples": step})


def finish(checkpoints: saving.CheckpointWriter, step: int) -> None:
    checkpoints.finish(step, fragments(), FACTS, {"step": step, "samples": step})
    checkpoints.close()


def test_saved_state_comes_back(url: str) -> None:
    finish(begin(url), 5)
    weights = ck.read_weights(url)
    assert {name: value.tolist() for name, value in weights.items()} == {
        **{name: value.tolist() for name, value in VALUES.items()},
        "flag": FLAG.tolist(),
    }
    loaded = ck.load_newest(url, [Span("a", 2, 7), Span("flag", 0, 3)], FACTS)
    assert loaded is not None
    commit, read = loaded
    assert commit.progress == {"step": 5, "samples": 5}
    assert torch.equal(read("a", 2, 7).tensors["exp_avg"], VALUES["a"][2:7] * 2)


def test_a_save_holds_the_state_of_its_step(url: str) -> None:
    """The state may change as soon as `wait_copied` returns, and not a moment later is it needed."""
    checkpoints = begin(url)
    live = torch.arange(10.0)
    parts = [Fragment("a", 0, 10, {"value": live}, {}), *[f for f in fragments() if f.name != "a"]]
    assert save(checkpoints, 1, parts)
    checkpoints.wait_copied()
    live.zero_()
    finish(checkpoints, 2)
    first = next(c for c in commits.find_commits(url).commits if c.step == 1)
    assert torch.equal(ck.read_weights(first.url)["a"], VALUES["a"])


def test_writing_that_falls_behind_leaves_saves_out_but_never_the_last(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    real = storage.write

    def slow(path: str, data: bytes) -> None:
        gate.wait()
        real(path, data)

    monkeypatch.setattr(saving.storage, "write", slow)
    checkpoints = begin(url)
    began = []
    for step in (1, 2, 3):
        began.append(save(checkpoints, step))
        if step == 1:
            checkpoints.wait_copied()
    assert began == [True, True, False]
    assert checkpoints.num_skipped == 1
    gate.set()
    finish(checkpoints, 4)
    assert [c.step for c in commits.find_commits(url).commits] == [4, 2]


def test_failed_uploads_are_counted_and_borne_except_the_last(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = storage.write

    def failing(path: str, data: bytes) -> None:
        if "step-000000000002" in path or "step-000000000009" in path:
            raise StorageError("no answer", where=path, fix="wait")
        real(path, data)

    monkeypatch.setattr(saving.storage, "write", failing)
    checkpoints = begin(url)
    with caplog.at_level(logging.WARNING, "vitrail"):
        save(checkpoints, 2)
        checkpoints.wait_copied()
        finish(checkpoints, 3)
    assert checkpoints.num_failed == 1
    assert "checkpoint at step 2 failed, training continues" in caplog.text
    assert [c.step for c in commits.find_commits(url).commits] == [3]
    with pytest.raises(StorageError, match="the last checkpoint couldn't be saved"):
        finish(begin(url, 3), 9)


def test_a_passing_fault_is_overcome(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, faults = storage.write, [3]

    def shaky(path: str, data: bytes) -> None:
        if faults[0] > 0:
            faults[0] -= 1
            raise ConnectionResetError("reset by peer")
        real(path, data)

    monkeypatch.setattr(saving.storage, "write", shaky)
    checkpoints = begin(url)
    finish(checkpoints, 1)
    assert checkpoints.num_failed == 0


def test_an_attempt_that_was_superseded_commits_no_more(url: str) -> None:
    old = begin(url)
    save(old, 1)
    old.wait_copied()
    old._pending.join()
    finish(begin(url, 1), 3)
    save(old, 2)
    old._pending.join()
    assert old.superseded
    with pytest.raises(CheckpointError, match="taken over"):
        finish(old, 4)
    assert [c.step for c in commits.find_commits(url).commits] == [3, 1]


def test_another_model_is_told_from_damage(url: str) -> None:
    finish(begin(url), 1)
    with pytest.raises(
        CheckpointError, match=r"another model: 1 tensors differ, extra among them \(missing in the checkpoint, 4 in"
    ):
        ck.load_newest(url, [Span("a", 0, 10)], FACTS | {"extra": FACTS["a"]._replace(shape=(4,))})
    narrow = FACTS | {"a": FACTS["a"]._replace(shape=(2, 3))}
    with pytest.raises(CheckpointError, match=r"a among them \(10 in the checkpoint, 2x3 in the model\)"):
        ck.load_newest(url, [Span("a", 0, 6)], narrow)


def test_no_checkpoints_are_no_error_to_a_new_run(url: str) -> None:
    assert ck.load_newest(url, [Span("a", 0, 10)], FACTS) is None


def test_weights_are_found_from_wherever_one_points(url: str, tmp_path: Path) -> None:
    finish(begin(url), 1)
    (commit,) = commits.find_commits(url).commits
    elsewhere = tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "status.json").write_text(json.dumps({"checkpoints": url}))
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"a": VALUES["a"]}, file)
    digests: dict[str, Any] = {
        place: ck.weights_digest(ck.read_weights(place)) for place in (url, str(tmp_path), commit.url, str(elsewhere))
    }
    assert len(set(digests.values())) == 1
    assert torch.equal(ck.read_weights(str(file))["a"], VALUES["a"])


def test_the_digest_tells_name_type_shape_and_value() -> None:
    a = torch.arange(6.0)
    variants = [{"a": a}, {"b": a}, {"a": a.double()}, {"a": a.view(2, 3)}, {"a": a + 1e-6}, {"a": a, "b": a}]
    assert len({ck.weights_digest(v) for v in variants}) == len(variants)
    assert ck.weights_digest({"a": a, "b": a}) == ck.weights_digest({"b": a, "a": a.clone()})
