"""A build from source to data set: list the inputs, scan their images, plan, write partitions, publish.

1. *List*: the source is streamed once and its rows are digested. Nothing is written before the source was checked and
   some images were tried. Rows that were appended since the last build become a segment of their own (`plan.segments`).
2. *Scan*, where it is needed (`duplicates`): splits by content, duplicates, evaluation images.
3. *Plan*: every input gets a split and a place in a shuffled order (`plan.planning`).
4. *Write*: tasks make one shard each (`samples.packing`) and commit it (`shards.commit`), on Ray (`partitions`).
5. *Publish*: shards get their final names, then come `sizes.json`, the manifests, and the account (`shards.finish`).

The same command resumes an interrupted build: it keeps the committed partitions, and refuses other settings or inputs.
Attempts are numbered, and only the newest one's tasks may commit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep import output, partitions, retry
from data_prep.account import Phase, PrepReport, Progress, Refused
from data_prep.config import PrepConfig
from data_prep.duplicates import scanning
from data_prep.plan import planning
from data_prep.plan.planning import Fingerprint, Partition, SegmentPlan
from data_prep.plan.segments import Retry, Segment, create_segment, next_segment, read_positions, read_segments
from data_prep.samples import packing
from data_prep.samples.packing import SegmentJob
from data_prep.shards import finish
from data_prep.shards.commit import Committed, json_bytes
from data_prep.sources.base import Source
from data_prep.tally import Tally
from pipeline import storage
from pipeline.errors import DataError

NUM_TRIED = 16  # inputs that are tried before anything is written

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
        retry_reasons: try inputs again that were refused for these reasons.
        progress: called now and then with where the build stands.
        stop: called between partitions; True ends the build in a state that the same command resumes.

    Raises:
        ConfigError: `config.output` holds another build, or this one with other inputs or settings.
        DataError: the source is unusable, or more inputs fail than `config.max_failed` allows.
        StorageError: a place can't be used.
        Stopped: `stop` returned True.
    """
    return Build(config, config.source.open(), retry.checked(retry_reasons), progress, stop).run()


class _Standing(NamedTuple):
    """What earlier attempts left in the output."""

    is_new: bool  # nothing
    segments: list[Segment]
    num_finished: int  # segments that are published
    report: PrepReport | None  # on these


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
        self.tally = Tally(config)
        self.settings: dict[str, Any] = {}  # that decide the data set's bytes, and their digest

    def run(self) -> PrepReport:
        self.source.check()
        self.settings = self._settings()
        standing = self._read_output()
        segments, report = standing.segments, standing.report
        with contextlib.ExitStack() as stack:
            plans = _Plans(self.config, self.source.size_bytes(), stack)
            appended = self._list_inputs(standing, plans)
            finished = report is not None and standing.num_finished == len(segments)
            if not (finished and appended is None and not self.retry_reasons):
                report = self._make(standing, appended, plans)
        assert report is not None
        return report._replace(duration_s=time.monotonic() - self.started)

    def _settings(self) -> dict[str, Any]:
        """What decides the data set's bytes beside the inputs, and its digest."""
        description = {
            "format": "vitrail.build",
            "format_version": output.FORMAT_VERSION,
            "settings": self.config.content_settings(),
            "classes": list(self.source.classes()),
        }
        return description | {"fingerprint": hashlib.sha256(json_bytes(description)).hexdigest()}

    def _read_output(self) -> _Standing:
        """What earlier attempts left.

        Raises:
            ConfigError: the output is another build's.
        """
        earlier = output.read_settings(self.url)
        segments = read_segments(self.url) if earlier is not None else []
        if earlier is not None:
            output.refuse_changed_settings(earlier, self.settings, self.url)
        num_finished, report = finish.finished_report(self.config.name, self.url) or (0, None)
        return _Standing(earlier is None, segments, num_finished, report)

    def _list_inputs(self, standing: _Standing, plans: _Plans) -> Segment | None:
        """Stream the source once: the segment of rows that no earlier segment has, and, unless images must be scanned
        first, the plans of all segments that aren't finished.

        Raises:
            ConfigError: the rows that earlier segments were made of have changed.
        """
        segments = standing.segments
        listed = [segment for segment in segments if segment.kind == "inputs"]
        fingerprint = Fingerprint([segment.stop for segment in listed])
        unfinished = [(segment, read_positions(self.url, segment)) for segment in segments[standing.num_finished :]]
        end = listed[-1].stop if listed else 0
        for batch in self.source.batches():
            first = fingerprint.rows
            fingerprint.update(batch)
            if not self.config.needs_scan:
                for segment, positions in unfinished:
                    plans.add(segment.number, segment.chosen(batch, positions))
                if fingerprint.rows > end:
                    plans.add(len(segments), batch.slice(max(0, end - first)))
            self._report_progress("plan", fingerprint.rows, None, self.started)
        self._refuse_changed_inputs(listed, fingerprint)
        return self._appended(segments, fingerprint)

    def _refuse_changed_inputs(self, listed: Sequence[Segment], inputs: Fingerprint) -> None:
        """Raise a ConfigError where the source's rows aren't those of the segments that were listed earlier."""
        if not listed:
            return
        end = listed[-1].stop
        if inputs.rows < end:
            raise output.changed(self.url, [f"number of inputs: {end} -> {inputs.rows}"])
        if inputs.at[end] != listed[-1].inputs_sha256:
            first = next(s.stop for s in listed if inputs.at.get(s.stop) != s.inputs_sha256)
            raise output.changed(self.url, [f"the source's content within its first {first} inputs"])

    def _appended(self, segments: Sequence[Segment], inputs: Fingerprint) -> Segment | None:
        """The segment of rows that no earlier segment has."""
        start = max((segment.stop for segment in segments), default=0)
        if inputs.rows == start:
            return None
        if start:
            log.info("%d inputs were appended to the earlier %d", inputs.rows - start, start)
        return next_segment(self.settings["fingerprint"], segments, (start, inputs.rows), inputs.hexdigest())

    def _make(self, standing: _Standing, appended: Segment | None, plans: _Plans) -> PrepReport | None:
        """Make all segments that aren't finished, then the retry's; the account of the last one made, if any was."""
        attempt = self._claim_output(standing, appended)
        segments, report = standing.segments, standing.report
        if appended is not None:
            segments.append(appended)
        with partitions.session(self.config.ray), partitions.scorers(self.config) as scorers:

            def make(number: int) -> PrepReport:
                job = self._job(segments[number], attempt)._replace(
                    tasks_at_once=partitions.num_tasks(self.config.ray), scorers=scorers
                )
                return self._make_segment(job, segments[: number + 1], plans.of(number))

            for number in range(standing.num_finished, len(segments)):
                report = make(number)
            if self.retry_reasons:
                retried = self._retry_segment(segments, plans)
                if retried is not None:
                    segments.append(retried)
                    report = make(retried.number)
        return report

    def _job(self, segment: Segment, attempt: int) -> SegmentJob:
        return SegmentJob(
            self.config, self.source.places(), self.source.classes(), segment.number, segment.fingerprint, attempt
        )

    def _claim_output(self, standing: _Standing, appended: Segment | None) -> int:
        """Claim the output for this attempt; the attempt's number."""
        if standing.is_new:
            assert appended is not None
            if self.config.max_failed < 1 and not self.config.filters:
                self._try_first_inputs(self._job(appended, 0))
            output.write_settings(self.url, self.settings)
        attempt = output.begin_attempt(self.url)
        storage.abort_uploads(storage.join(self.url, "_prep", "staged"))
        if appended is not None and not create_segment(self.url, appended):
            raise output.taken(self.url)
        return attempt

    def _try_first_inputs(self, job: SegmentJob) -> None:
        """Convert the first few inputs; if none works, the settings are wrong rather than the inputs."""
        rows = (row for batch in self.source.batches() for row in batch.to_pylist())
        refusals: list[tuple[bytes | None, Refused]] = []
        for row in itertools.islice(rows, NUM_TRIED):  # one by one: most builds stop at the first
            refused = packing.try_inputs(job, [row])[0]
            if refused is None:
                return
            refusals.append((row["url"], refused))
        url, refused = refusals[0]
        raise DataError(
            f"none of the first {len(refusals)} inputs can be used: {refused.message} ({refused.reason})",
            where=f"{self.config.source.url}, input {(url or b'').decode('utf-8', 'replace')!r}",
            fix="check the source's columns, where its images lie, and the limits (max_failed: 1 skips this trial)",
        )

    def _make_segment(self, job: SegmentJob, segments: Sequence[Segment], plan: SegmentPlan) -> PrepReport:
        """Make one segment, the last of `segments`, and publish it."""
        segment = segments[-1]
        if self.config.needs_scan:
            self._scan(job, segment)
            self._plan_by_content(segments, plan)
        if segment.number == 0:
            self._refuse_empty_splits(plan)
        committed = finish.read_markers(self.url, segments)
        num_resumed = len([place for place in committed if place[0] == segment.number])
        self._write_partitions(job, segment, plan, committed)
        output.check_attempt(self.url, job.attempt)
        report = self._publish(segments, committed, job.classes)
        return report._replace(resumed_partitions=num_resumed)

    def _segment_inputs(self, segment: Segment) -> Iterator[pa.RecordBatch]:
        """A segment's rows, in order."""
        positions = read_positions(self.url, segment)
        for batch in self.source.batches():
            chosen = segment.chosen(batch, positions)
            if chosen.num_rows:
                yield chosen

    def _scan(self, job: SegmentJob, segment: Segment) -> None:
        """Read all images of a segment, and write down what they are recognised by."""
        done = 0
        started = time.monotonic()
        results = partitions.run(
            functools.partial(scanning.scan, job),
            scanning.chunks(self._segment_inputs(segment)),
            self.config.ray,
            stop=self.stop,
        )
        with contextlib.closing(results):
            for _, rows in results:
                done += rows
                self._report_progress("scan", done, segment.num_inputs, started)

    def _plan_by_content(self, segments: Sequence[Segment], plan: SegmentPlan) -> None:
        """Judge all inputs up to this segment by what the scans found, and plan this segment's."""
        judged = retry.judge(self.config, segments, self.stop)
        splits = None if self.config.source.names_splits else list(self.config.splits.shares)
        start = judged.starts[-1]
        for chunk in scanning.chunks(self._segment_inputs(segments[-1])):
            scanned = scanning.read_scan(self.url, segments[-1].number, chunk.number)
            plan.add(scanning.with_verdicts(chunk.inputs, scanned, judged, start, splits))
            start += chunk.inputs.num_rows

    def _write_partitions(
        self, job: SegmentJob, segment: Segment, plan: SegmentPlan, committed: finish.Markers
    ) -> None:
        """Make the segment's partitions that aren't committed yet, and add them to `committed`."""
        self.tally.clear()
        for part in committed.values():
            self.tally.add(part, segment.stop)
        num_resumed = self.tally.num_inputs
        started = time.monotonic()
        written_bytes = 0
        missing = (part for part in plan.partitions() if (segment.number, part.split, part.number) not in committed)
        results = partitions.run(functools.partial(self.pack, job), missing, self.config.ray, stop=self.stop)
        with contextlib.closing(results):
            for part in results:
                if part.fingerprint != job.fingerprint:
                    raise output.taken(self.url)
                committed[part.place] = part
                self.tally.add(part, segment.stop)
                written_bytes += part.shard.size_bytes if part.shard else 0
                self._report_progress(
                    "write",
                    self.tally.num_inputs,
                    segment.stop,
                    started,
                    size_bytes=written_bytes,
                    num_resumed=num_resumed,
                )
        self._check_partitions(segment, plan, committed)
        self.tally.refuse_many_failures(segment.stop, final=True)

    @staticmethod
    def _check_partitions(segment: Segment, plan: SegmentPlan, committed: finish.Markers) -> None:
        """All inputs of the segment must be accounted for."""
        parts = {place: part for place, part in committed.items() if place[0] == segment.number}
        planned = {(segment.number, split, n) for split in plan.splits() for n in range(plan.num_partitions(split))}
        if set(parts) != planned or sum(part.inputs for part in parts.values()) != segment.num_inputs:
            raise RuntimeError(f"committed partitions {sorted(parts)} are not the planned ones {sorted(planned)}")

    def _publish(self, segments: Sequence[Segment], committed: finish.Markers, classes: tuple[str, ...]) -> PrepReport:
        started = time.monotonic()

        def progress(done: int, total: int) -> None:
            self._report_progress("publish", done, total, started)

        return finish.finish(self.config, committed, segments, classes, progress)

    def _retry_segment(self, segments: Sequence[Segment], plans: _Plans) -> Segment | None:
        """Begin a segment of the inputs that were refused for `retry_reasons`; None where there are none."""
        positions = retry.refused_positions(self.url, segments, self.retry_reasons)
        if not len(positions):
            log.info("no input was refused for %s", " or ".join(self.retry_reasons))
            return None
        log.info("trying %d inputs again", len(positions))
        listed = [segment for segment in segments if segment.kind == "inputs"]
        segment = next_segment(
            self.settings["fingerprint"],
            segments,
            (0, listed[-1].stop),
            listed[-1].inputs_sha256,
            Retry(self.retry_reasons, positions),
        )
        if not create_segment(self.url, segment, positions):
            raise output.taken(self.url)
        if not self.config.needs_scan:
            for batch in self._segment_inputs(segment):
                plans.add(segment.number, batch)
        return segment

    def _refuse_empty_splits(self, plan: SegmentPlan) -> None:
        if self.config.source.names_splits:
            return
        for name in self.config.splits.shares:
            if not plan.counts[name]:
                raise DataError(
                    f"split {name!r} gets no input",
                    where=self.config.source.url,
                    fix="enlarge its share in splits.shares",
                )

    def _report_progress(
        self, phase: Phase, done: int, total: int | None, started: float, *, size_bytes: int = 0, num_resumed: int = 0
    ) -> None:
        """Call back with where the build stands.

        Args:
            started: when the phase began (monotonic seconds).
        """
        self.progress(
            Progress(
                phase,
                done,
                total,
                self.tally.num_written,
                self.tally.num_filtered,
                self.tally.num_failed,
                time.monotonic() - started,
                size_bytes,
                num_resumed,
            )
        )


class _Plans:
    """A plan for each segment that is to be made; their spill files go when the stack closes."""

    def __init__(self, config: PrepConfig, size_bytes: int, stack: contextlib.ExitStack) -> None:
        self._config = config
        self._size_bytes = size_bytes
        self._stack = stack
        self._plans: dict[int, SegmentPlan] = {}

    def of(self, number: int) -> SegmentPlan:
        """The plan of segment `number`."""
        if number not in self._plans:
            plan = SegmentPlan(self._config.seed, self._config.shard.samples, size_bytes=self._size_bytes)
            self._plans[number] = self._stack.enter_context(plan)
        return self._plans[number]

    def add(self, number: int, batch: pa.RecordBatch) -> None:
        """Plan inputs whose splits don't depend on their images."""
        if batch.num_rows:
            if not self._config.source.names_splits:
                batch = planning.by_url(batch, self._config.splits.shares, self._config.seed)
            self.of(number).add(batch)
