"""A build from source to data set: survey, plan, partitions, manifests.

1. *Survey*: the source is streamed once; its digest and the settings make the build's fingerprint. Nothing is written
   before the source was checked and some images were tried.
2. *Plan*: every input gets a split and a place in a shuffled order (`planning`). For splits by content, the images
   are digested first (`packing.scan`).
3. *Partitions*: tasks make one shard each and commit it (`packing.pack`, `shards`), on Ray (`partitions`).
4. *Finish*: shards are numbered without gaps, then `sizes.json`, then the manifest of every split, then `prep.json`.

Run again, a build goes on where it stood: committed partitions are kept if the fingerprint is the same, and refused
with what changed if not.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from data_prep import finish, packing, partitions, planning
from data_prep.account import PrepReport, Progress, Refused, describe
from data_prep.config import PrepConfig
from data_prep.packing import Chunk, Job
from data_prep.planning import Fingerprint, Plan
from data_prep.shards import Committed, json_bytes
from data_prep.sources import Source, open_source
from pipeline import storage
from pipeline.errors import ConfigError, DataError

BUILD_NAME = "build.json"
BUILD_FORMAT_VERSION = 1
NUM_TRIED = 16  # inputs that are tried before anything is written
SCAN_ROWS = 2048  # inputs whose images a task digests
_TOO_FEW_TO_JUDGE = 20  # failures below which a build never gives up early

ProgressCallback = Callable[[Progress], None]


def build(
    config: PrepConfig, *, progress: ProgressCallback = lambda _: None, stop: Callable[[], bool] = lambda: False
) -> PrepReport:
    """Make the data set that `config` describes, or finish it.

    Args:
        progress: called now and then with where the build stands.
        stop: asked between partitions; yes ends the build in a state that the same command resumes.

    Raises:
        ConfigError: `config.output` holds another build, or this one with other inputs or settings.
        DataError: the source is unusable, or more inputs fail than `config.max_failed` allows.
        StorageError: a place can't be used.
        Stopped: `stop` said so.
    """
    return _Build(config, progress, stop).run()


class _Build:
    """One attempt at a build."""

    def __init__(self, config: PrepConfig, progress: ProgressCallback, stop: Callable[[], bool]) -> None:
        self.config = config
        self.url = config.output
        self.source: Source = open_source(config.source)
        self.progress = progress
        self.stop = stop
        self.started = time.monotonic()
        self.written = 0
        self.failed: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def run(self) -> PrepReport:
        self.source.check()
        earlier = _earlier_build(self.url)
        with Plan(self.config.seed, self.config.shard.samples, size_bytes=self.source.size_bytes()) as plan:
            inputs = self._survey(plan)
            if not self._splits_by_content():
                self._refuse_empty_splits(plan)
            description = self._describe(inputs)
            fingerprint = description["fingerprint"]
            if earlier is not None:
                _refuse_changes(earlier, description, self.url)
                finished = finish.finished_report(self.config.name, self.url, fingerprint)
                if finished is not None:
                    return finished._replace(duration_s=time.monotonic() - self.started)
            job = Job(self.config, self.source.places(), self.source.classes(), fingerprint, attempt=0)
            if earlier is None:
                if self.config.max_failed < 1:
                    self._try_some(job)
                storage.create(_build_url(self.url), json_bytes(description))
                _refuse_changes(_earlier_build(self.url) or description, description, self.url)
            job = job._replace(attempt=_begin_attempt(self.url))
            with partitions.session(self.config.ray):
                if self._splits_by_content():
                    self._scan(job, inputs.rows)
                    self._plan_by_content(plan)
                return self._write(job, plan, inputs.rows)

    def _splits_by_content(self) -> bool:
        """Whether images must be read to know their split: not with a single one."""
        splits = self.config.splits
        return self.config.source.split_column is None and splits.by == "content" and len(splits.shares) > 1

    def _survey(self, plan: Plan) -> Fingerprint:
        """Stream the source once: its digest, and the plan unless that needs the images' content."""
        fingerprint = Fingerprint()
        by_content = self._splits_by_content()
        for batch in self.source.batches():
            fingerprint.update(batch)
            if not by_content:
                own = self.config.source.split_column is not None
                plan.add(batch if own else planning.by_url(batch, self.config.splits.shares, self.config.seed))
            self._tell("plan", fingerprint.rows, None)
        return fingerprint

    def _describe(self, inputs: Fingerprint) -> dict[str, Any]:
        """What decides the data set's bytes, and its digest."""
        description = {
            "format": "vitrail.build",
            "format_version": BUILD_FORMAT_VERSION,
            "settings": self.config.content_settings(),
            "classes": list(self.source.classes()),
            "inputs": inputs.rows,
            "inputs_sha256": inputs.hexdigest(),
        }
        return description | {"fingerprint": hashlib.sha256(json_bytes(description)).hexdigest()}

    def _try_some(self, job: Job) -> None:
        """Convert the first few inputs; if none works, the settings are wrong rather than the inputs."""
        first = itertools.islice((row for batch in self.source.batches() for row in batch.to_pylist()), NUM_TRIED)
        refusals: list[tuple[bytes | None, Refused]] = []
        for row in first:
            refused = packing.convert_one(job, row)
            if refused is None:
                return
            refusals.append((row["url"], refused))
        url, refused = refusals[0]
        raise DataError(
            f"none of the first {len(refusals)} inputs can be used: {refused.message} ({refused.reason})",
            where=f"{self.config.source.url}, input {(url or b'').decode('utf-8', 'replace')!r}",
            fix="check the source's columns, where its images lie and the limits set (max_failed: 1 skips this trial)",
        )

    def _scan(self, job: Job, num_inputs: int) -> None:
        done = 0
        tasks = (Chunk(number, rows.column("url").to_pylist()) for number, rows in enumerate(self._chunks()))
        run = partitions.run(functools.partial(packing.scan, job), tasks, self.config.ray, stop=self.stop)
        with contextlib.closing(run):
            for _, rows in run:
                done += rows
                self._tell("scan", done, num_inputs)

    def _chunks(self) -> Iterator[pa.RecordBatch]:
        """The source's inputs in order, in pieces that one task scans."""
        for batch in self.source.batches():
            for start in range(0, batch.num_rows, SCAN_ROWS):
                yield batch.slice(start, SCAN_ROWS)

    def _plan_by_content(self, plan: Plan) -> None:
        for number, rows in enumerate(self._chunks()):
            digests = packing.read_scan(self.url, number)
            plan.add(planning.by_content(rows, digests, self.config.splits.shares, self.config.seed))
        self._refuse_empty_splits(plan)

    def _write(self, job: Job, plan: Plan, num_inputs: int) -> PrepReport:
        committed = finish.read_markers(self.url, job.fingerprint)
        resumed = len(committed)
        for found in committed.values():
            self._count(found, num_inputs)
        todo = (part for part in plan.partitions() if (part.split, part.number) not in committed)
        run = partitions.run(functools.partial(packing.pack, job), todo, self.config.ray, stop=self.stop)
        with contextlib.closing(run):
            for result in run:
                if result.fingerprint != job.fingerprint:
                    raise _taken(self.url)
                committed[result.split, result.number] = result
                self._count(result, num_inputs)
        expected = {(split, number) for split in plan.splits() for number in range(plan.num_partitions(split))}
        if set(committed) != expected or sum(c.inputs for c in committed.values()) != num_inputs:
            raise RuntimeError(f"committed partitions {sorted(committed)} are not the planned ones {sorted(expected)}")
        self._refuse_many_failures(num_inputs, final=True)
        packing.check_attempt(self.url, job.attempt)
        report = finish.finish(self.config, committed, job.classes, job.fingerprint)
        return report._replace(resumed_partitions=resumed, duration_s=time.monotonic() - self.started)

    def _refuse_empty_splits(self, plan: Plan) -> None:
        if self.config.source.split_column is None:
            for name in self.config.splits.shares:
                if not plan.counts[name]:
                    raise DataError(
                        f"split {name!r} gets no input",
                        where=self.config.source.url,
                        fix="enlarge its share in splits.shares",
                    )

    def _count(self, result: Committed, num_inputs: int) -> None:
        self.written += result.written
        self.failed.update(result.failed)
        for reason, example in result.examples.items():
            self.examples.setdefault(reason, example)
        self._tell("write", self.written + self.failed.total(), num_inputs)
        self._refuse_many_failures(num_inputs, final=False)

    def _refuse_many_failures(self, num_inputs: int, *, final: bool) -> None:
        """Give up once more inputs have failed than `max_failed` allows."""
        failed = self.failed.total()
        beyond = failed > self.config.max_failed * num_inputs
        if (beyond and (final or failed >= _TOO_FEW_TO_JUDGE)) or (final and self.written == 0):
            raise DataError(
                f"{failed} of {num_inputs} inputs failed: {describe(self.failed, self.examples)}",
                where=self.config.source.url,
                fix="mend the inputs, or raise max_failed and run the same command: what is done stays done",
            )

    def _tell(self, phase: Any, done: int, total: int | None) -> None:
        elapsed_s = time.monotonic() - self.started
        self.progress(Progress(phase, done, total, self.written, self.failed.total(), elapsed_s))


def _build_url(url: str) -> str:
    return storage.join(url, "_prep", BUILD_NAME)


def _earlier_build(url: str) -> dict[str, Any] | None:
    """What an earlier attempt wrote about itself.

    Raises:
        ConfigError: the folder holds something else.
    """
    place = _build_url(url)
    try:
        found: dict[str, Any] = json.loads(storage.read(place))
    except FileNotFoundError:
        other = next(storage.entries(url), None)
        if other is None:
            return None
        raise ConfigError(
            f"the folder isn't empty ({other.url}) and holds no build of ours",
            where=f"output {url}",
            fix="choose another",
        ) from None
    except ValueError as error:
        raise DataError(f"no JSON ({error})", where=place, fix="delete the output folder and build again") from error
    return found


def _refuse_changes(earlier: dict[str, Any], now: dict[str, Any], url: str) -> None:
    """Raise a ConfigError that names what differs between an earlier attempt and this one."""
    if earlier["fingerprint"] == now["fingerprint"]:
        return
    before, after = _flat(earlier["settings"]), _flat(now["settings"])
    changes = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
    if earlier["inputs"] != now["inputs"]:
        changes.append(f"number of inputs: {earlier['inputs']} -> {now['inputs']}")
    elif earlier["inputs_sha256"] != now["inputs_sha256"]:
        changes.append("the table's content")
    if earlier["classes"] != now["classes"]:
        changes.append("the classes' names")
    raise ConfigError(
        f"this output was begun with other inputs or settings ({'; '.join(changes) or 'another format'})",
        where=f"output {url}",
        fix="restore them to finish that build, or choose another output",
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _begin_attempt(url: str) -> int:
    """Number this attempt, so that workers of a dead one stop writing beside it."""
    folder = packing.attempts_url(url)
    number = max((packing.attempt_number(entry.url) for entry in storage.entries(folder)), default=0)
    while True:
        number += 1
        # The nonce tells this attempt's file from another's where both race for the number.
        content = json_bytes({"number": number, "begun": time.time(), "nonce": secrets.token_hex(8)})
        if storage.create(storage.join(folder, f"{number:06d}.json"), content):
            return number


def _taken(url: str) -> ConfigError:
    return ConfigError(
        "another build writes into this output", where=f"output {url}", fix="give each build an output of its own"
    )
