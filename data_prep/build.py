"""A build from source to data set: survey, look, plan, partitions, publishing.

1. *Survey*: the source is streamed once and its rows digested. Nothing is written before the source was checked and
   some images were tried. Rows that were appended since the last build become a segment of their own (`plan.segments`).
2. *Look*, where it is needed (`duplicates`): splits by content, duplicates, evaluation images.
3. *Plan*: every input gets a split and a place in a shuffled order (`plan.planning`).
4. *Partitions*: tasks make one shard each (`samples.packing`) and commit it (`shards.commit`), on Ray (`partitions`).
5. *Finish*: shards get their final names, then come `sizes.json`, the manifests, and the account (`shards.finish`).

Run again, a build goes on where it stood: committed partitions are kept if settings and inputs are the same, and
refused with what changed if not.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa

from data_prep import partitions, retry
from data_prep.account import PrepReport, Progress, Refused, by_reason, describe, total
from data_prep.config import PrepConfig
from data_prep.duplicates import scanning
from data_prep.plan import planning
from data_prep.plan.planning import Fingerprint, Partition, SegmentPlan
from data_prep.plan.segments import Segment, create_segment, next_segment, read_positions, read_segments
from data_prep.samples import packing
from data_prep.samples.packing import SegmentJob
from data_prep.shards import finish
from data_prep.shards.commit import Committed, json_bytes, read_document
from data_prep.sources.base import Source
from pipeline import storage
from pipeline.errors import ConfigError, DataError

BUILD_NAME = "build.json"
BUILD_FORMAT_VERSION = 3
NUM_TRIED = 16  # inputs that are tried before anything is written
_TOO_FEW_TO_JUDGE = 20  # failures below which a build never gives up early

ProgressCallback = Callable[[Progress], None]
log = logging.getLogger("vitrail")


def build(
    config: PrepConfig,
    *,
    retry_reasons: Sequence[str] = (),
    progress: ProgressCallback = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> PrepReport:
    """Make the data set that `config` describes, finish it, or append what its source has gained.

    Args:
        retry_reasons: try inputs once more that were refused for these reasons.
        progress: called now and then with where the build stands.
        stop: asked between partitions; yes ends the build in a state that the same command resumes.

    Raises:
        ConfigError: `config.output` holds another build, or this one with other inputs or settings.
        DataError: the source is unusable, or more inputs fail than `config.max_failed` allows.
        StorageError: a place can't be used.
        Stopped: `stop` said so.
    """
    return Build(config, config.source.open(), retry.checked(retry_reasons), progress, stop).run()


class Build:
    """One attempt at a build.

    Args:
        source: what `config.source` describes.
        pack: makes and commits a partition.
    """

    def __init__(
        self,
        config: PrepConfig,
        source: Source,
        retry_reasons: tuple[str, ...] = (),
        progress: ProgressCallback = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        pack: Callable[[SegmentJob, Partition], Committed] = packing.pack,
    ) -> None:
        self.config = config
        self.url = config.output
        self.source = source
        self.pack = pack
        self.retry_reasons = retry_reasons
        self.progress = progress
        self.stop = stop
        self.started = time.monotonic()
        self.counts: Counter[str] = Counter()  # "" counts samples written
        self.examples: dict[str, str] = {}

    def run(self) -> PrepReport:
        self.source.check()
        settings = self._settings()
        earlier = _earlier_build(self.url)
        segments = read_segments(self.url) if earlier is not None else []
        if earlier is not None:
            _refuse_changed_settings(earlier, settings, self.url)
        finished, report = finish.finished_report(self.config.name, self.url) or (0, None)
        with contextlib.ExitStack() as stack:
            plans = _Plans(self.config, self.source.size_bytes(), stack)
            inputs = self._survey(segments, finished, plans)
            grown = self._grown(settings, segments, inputs)
            if report is not None and finished == len(segments) and grown is None and not self.retry_reasons:
                return report._replace(duration_s=time.monotonic() - self.started)
            attempt = self._begin(settings, earlier, segments, grown)
            if grown is not None:
                segments.append(grown)
            with partitions.session(self.config.ray), partitions.scorers(self.config) as scorers:
                workers = partitions.num_workers(self.config.ray)
                for segment in segments[finished:]:
                    job = self._job(segment, attempt)._replace(tasks_at_once=workers, scorers=scorers)
                    report = self._do(job, segments[: segment.number + 1], plans.of(segment))
                if self.retry_reasons:
                    retried = self._retry(settings, segments, plans)
                    if retried is not None:
                        segments.append(retried)
                        job = self._job(retried, attempt)._replace(tasks_at_once=workers, scorers=scorers)
                        report = self._do(job, segments, plans.of(retried))
        assert report is not None
        return report._replace(duration_s=time.monotonic() - self.started)

    def _job(self, segment: Segment, attempt: int) -> SegmentJob:
        return SegmentJob(
            self.config, self.source.places(), self.source.classes(), segment.number, segment.fingerprint, attempt
        )

    def _settings(self) -> dict[str, Any]:
        """What decides the data set's bytes beside the inputs, and its digest."""
        description = {
            "format": "vitrail.build",
            "format_version": BUILD_FORMAT_VERSION,
            "settings": self.config.content_settings(),
            "classes": list(self.source.classes()),
        }
        return description | {"fingerprint": hashlib.sha256(json_bytes(description)).hexdigest()}

    def _survey(self, segments: Sequence[Segment], finished: int, plans: _Plans) -> Fingerprint:
        """Stream the source once: its digest, and the plans unless those need the images' content.

        Raises:
            ConfigError: the rows that earlier segments were made of have changed.
        """
        known = [segment for segment in segments if segment.kind == "inputs"]
        fingerprint = Fingerprint([segment.stop for segment in known])
        open_ones = [(segment, read_positions(self.url, segment)) for segment in segments[finished:]]
        end = known[-1].stop if known else 0
        for batch in self.source.batches():
            first = fingerprint.rows
            fingerprint.update(batch)
            if not self.config.needs_scan:
                for segment, positions in open_ones:
                    plans.add(segment.number, segment.chosen(batch, positions))
                if fingerprint.rows > end:
                    plans.add(len(segments), batch.slice(max(0, end - first)))
            self._tell("plan", fingerprint.rows, None, 0.0)
        if known and (fingerprint.rows < end or fingerprint.at[end] != known[-1].inputs_sha256):
            changed = [s.stop for s in known if fingerprint.at.get(s.stop) != s.inputs_sha256]
            what = (
                f"number of inputs: {end} -> {fingerprint.rows}"
                if fingerprint.rows < end
                else f"the source's content within its first {changed[0]} inputs"
            )
            raise _changed(self.url, [what])
        return fingerprint

    def _grown(self, settings: dict[str, Any], segments: Sequence[Segment], inputs: Fingerprint) -> Segment | None:
        """The segment of rows that no earlier segment has."""
        start = max((segment.stop for segment in segments), default=0)
        if inputs.rows == start:
            return None
        if start:
            log.info("%d inputs were appended to the %d there were", inputs.rows - start, start)
        return next_segment(settings["fingerprint"], segments, "inputs", (start, inputs.rows), inputs.hexdigest())

    def _begin(
        self,
        settings: dict[str, Any],
        earlier: dict[str, Any] | None,
        segments: Sequence[Segment],
        grown: Segment | None,
    ) -> int:
        """Claim the output for this attempt; the attempt's number."""
        if earlier is None:
            assert grown is not None
            if self.config.max_failed < 1 and not self.config.filters:
                self._try_some(self._job(grown, 0))
            storage.create(storage.join(self.url, "_prep", BUILD_NAME), json_bytes(settings))
            _refuse_changed_settings(_earlier_build(self.url) or settings, settings, self.url)
        attempt = _begin_attempt(self.url)
        storage.abort_uploads(storage.join(self.url, "_prep", "staged"))
        if grown is not None and not create_segment(self.url, grown):
            raise _taken(self.url)
        return attempt

    def _try_some(self, job: SegmentJob) -> None:
        """Convert the first few inputs; if none works, the settings are wrong rather than the inputs."""
        first = list(itertools.islice((row for batch in self.source.batches() for row in batch.to_pylist()), NUM_TRIED))
        refusals: list[tuple[bytes | None, Refused]] = []
        for row in first:  # one by one: most builds stop at the first
            refused = packing.convert_some(job, [row])[0]
            if refused is None:
                return
            refusals.append((row["url"], refused))
        url, refused = refusals[0]
        raise DataError(
            f"none of the first {len(refusals)} inputs can be used: {refused.message} ({refused.reason})",
            where=f"{self.config.source.url}, input {(url or b'').decode('utf-8', 'replace')!r}",
            fix="check the source's columns, where its images lie and the limits set (max_failed: 1 skips this trial)",
        )

    def _do(self, job: SegmentJob, segments: Sequence[Segment], plan: SegmentPlan) -> PrepReport:
        """Make one segment, the last of `segments`, and publish it."""
        segment = segments[-1]
        if self.config.needs_scan:
            self._scan(job, segment)
            self._plan_by_content(segments, plan)
        if segment.number == 0:
            self._refuse_empty_splits(plan)
        committed = finish.read_markers(self.url, segments)
        resumed = len([place for place in committed if place[0] == segment.number])
        self._write(job, segment, plan, committed)
        packing.check_attempt(self.url, job.attempt)
        phase_started = time.monotonic()

        def tell(done: int, all_parts: int) -> None:
            self._tell("publish", done, all_parts, time.monotonic() - phase_started)

        report = finish.finish(self.config, committed, segments, job.classes, tell)
        return report._replace(resumed_partitions=resumed)

    def _inputs(self, segment: Segment) -> Iterator[pa.RecordBatch]:
        """A segment's rows, in order."""
        positions = read_positions(self.url, segment)
        for batch in self.source.batches():
            chosen = segment.chosen(batch, positions)
            if chosen.num_rows:
                yield chosen

    def _scan(self, job: SegmentJob, segment: Segment) -> None:
        done = 0
        started = time.monotonic()
        run = partitions.run(
            functools.partial(scanning.scan, job),
            scanning.chunks(self._inputs(segment)),
            self.config.ray,
            stop=self.stop,
        )
        with contextlib.closing(run):
            for _, rows in run:
                done += rows
                self._tell("scan", done, segment.num_inputs, time.monotonic() - started)

    def _plan_by_content(self, segments: Sequence[Segment], plan: SegmentPlan) -> None:
        """Judge all inputs up to this segment by what was found, and plan this segment's."""
        decisions, positions, starts = retry.judge(self.config, self.url, segments, self.source, self.stop)
        start = starts[-1]
        for chunk in scanning.chunks(self._inputs(segments[-1])):
            found = scanning.read_scan(self.url, segments[-1].number, chunk.number)
            rows = scanning.with_decisions(
                chunk.inputs,
                found,
                decisions,
                start,
                positions,
                list(self.config.splits.shares),
                names_splits=self.config.source.names_splits,
            )
            plan.add(rows)
            start += rows.num_rows

    def _write(self, job: SegmentJob, segment: Segment, plan: SegmentPlan, committed: finish.Markers) -> None:
        for found in committed.values():
            self._count(found, segment.stop)
        resumed = sum(found.inputs for found in committed.values())
        started = time.monotonic()
        written_bytes = 0
        todo = (part for part in plan.partitions() if (segment.number, part.split, part.number) not in committed)
        run = partitions.run(functools.partial(self.pack, job), todo, self.config.ray, stop=self.stop)
        with contextlib.closing(run):
            for result in run:
                if result.fingerprint != job.fingerprint:
                    raise _taken(self.url)
                committed[result.place] = result
                self._count(result, segment.stop)
                written_bytes += result.shard.size_bytes if result.shard else 0
                done = sum(self.counts.values())
                elapsed_s = time.monotonic() - started
                self._tell("write", done, segment.stop, elapsed_s, size_bytes=written_bytes, resumed=resumed)
        ours = {place: part for place, part in committed.items() if place[0] == segment.number}
        expected = {(segment.number, split, n) for split in plan.splits() for n in range(plan.num_partitions(split))}
        if set(ours) != expected or sum(part.inputs for part in ours.values()) != segment.num_inputs:
            raise RuntimeError(f"committed partitions {sorted(ours)} are not the planned ones {sorted(expected)}")
        self._refuse_many_failures(segment.stop, final=True)

    def _retry(self, settings: dict[str, Any], segments: Sequence[Segment], plans: _Plans) -> Segment | None:
        """Begin a segment of the inputs that were refused for the reasons given; None where there are none."""
        positions = retry.refused_positions(self.url, segments, self.retry_reasons)
        if not len(positions):
            log.info("no input was refused for %s", " or ".join(self.retry_reasons))
            return None
        log.info("%d inputs are tried once more", len(positions))
        inputs = [segment for segment in segments if segment.kind == "inputs"]
        segment = next_segment(
            settings["fingerprint"],
            segments,
            "retry",
            (0, inputs[-1].stop),
            inputs[-1].inputs_sha256,
            reasons=self.retry_reasons,
            positions=positions,
        )
        if not create_segment(self.url, segment, positions):
            raise _taken(self.url)
        self.counts.clear()
        if not self.config.needs_scan:
            for batch in self._inputs(segment):
                plans.add(segment.number, batch)
        return segment

    def _refuse_empty_splits(self, plan: SegmentPlan) -> None:
        if not self.config.source.names_splits:
            for name in self.config.splits.shares:
                if not plan.counts[name]:
                    raise DataError(
                        f"split {name!r} gets no input",
                        where=self.config.source.url,
                        fix="enlarge its share in splits.shares",
                    )

    def _count(self, result: Committed, num_inputs: int) -> None:
        self.counts[""] += result.written
        self.counts.update(result.refused)
        for reason, example in result.examples.items():
            self.examples.setdefault(reason, example)
        self._refuse_many_failures(num_inputs, final=False)

    def _refuse_many_failures(self, num_inputs: int, *, final: bool) -> None:
        """Give up once more inputs have failed than `max_failed` allows."""
        counts = by_reason(self.counts, filtered=False)
        failed = sum(counts.values())
        beyond = failed > self.config.max_failed * num_inputs
        if (beyond and (final or failed >= _TOO_FEW_TO_JUDGE)) or (final and self.counts[""] == 0):
            struck = counts or by_reason(self.counts)
            raise DataError(
                f"{sum(struck.values())} of {num_inputs} inputs failed: {describe(struck, self.examples)}",
                where=self.config.source.url,
                fix="mend the inputs, or raise max_failed and run the same command: what is done stays done",
            )

    def _tell(
        self,
        phase: Literal["plan", "scan", "write", "publish"],
        done: int,
        of: int | None,
        elapsed_s: float,
        *,
        size_bytes: int = 0,
        resumed: int = 0,
    ) -> None:
        filtered, failed = (total(self.counts, filtered=kind) for kind in (True, False))
        elapsed_s = elapsed_s or time.monotonic() - self.started
        self.progress(Progress(phase, done, of, self.counts[""], filtered, failed, elapsed_s, size_bytes, resumed))


class _Plans:
    """A plan for each segment that is to be made, their spill files gone with the stack."""

    def __init__(self, config: PrepConfig, size_bytes: int, stack: contextlib.ExitStack) -> None:
        self._config = config
        self._size_bytes = size_bytes
        self._stack = stack
        self._plans: dict[int, SegmentPlan] = {}

    def of(self, segment: Segment | int) -> SegmentPlan:
        """The plan of a segment."""
        number = segment if isinstance(segment, int) else segment.number
        if number not in self._plans:
            plan = SegmentPlan(self._config.seed, self._config.shard.samples, size_bytes=self._size_bytes)
            self._plans[number] = self._stack.enter_context(plan)
        return self._plans[number]

    def add(self, number: int, batch: pa.RecordBatch) -> None:
        """Plan inputs whose splits need no look at the images."""
        if batch.num_rows:
            if not self._config.source.names_splits:
                batch = planning.by_url(batch, self._config.splits.shares, self._config.seed)
            self.of(number).add(batch)


def _earlier_build(url: str) -> dict[str, Any] | None:
    """What an earlier attempt wrote about itself.

    Raises:
        ConfigError: the folder holds something else.
    """
    place = storage.join(url, "_prep", BUILD_NAME)
    try:
        return read_document(place, BUILD_FORMAT_VERSION, "a build", "delete the output folder and build again")
    except FileNotFoundError:
        other = next(storage.entries(url), None)
        if other is None:
            return None
        raise ConfigError(
            f"the folder isn't empty ({other.url}) and holds no build of ours",
            where=f"output {url}",
            fix="choose another",
        ) from None


def _refuse_changed_settings(earlier: dict[str, Any], now: dict[str, Any], url: str) -> None:
    """Raise a ConfigError that names the settings that differ between an earlier attempt and this one."""
    if earlier["fingerprint"] == now["fingerprint"]:
        return
    before, after = _flat(earlier["settings"]), _flat(now["settings"])
    changes = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
    if earlier["classes"] != now["classes"]:
        changes.append("the classes' names")
    raise _changed(url, changes)


def _changed(url: str, changes: Sequence[str]) -> ConfigError:
    return ConfigError(
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
