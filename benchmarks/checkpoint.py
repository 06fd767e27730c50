"""Saving and resuming: stall per save against DeepSpeed's save_checkpoint, bandwidth against the disk, faults, kills.

One ViT-B under ZeRO-2 on one rank, to the same disk. Steps under faults go to a real S3 server through a proxy that
delays, resets and answers 503. All ratios are of pairs within one run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Comparison, Contender, Goal, UnequalWork, Work, compare

BYTES_PER_ELEMENT = 12  # master and two moments
NUM_STEPS, SAVE_EVERY = 50, 10


def run(pairs: int) -> list[Comparison]:
    """The comparisons, each of which cleans up after itself."""
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=os.environ.get("VITRAIL_BENCH_DIR")))
    try:
        with _engine("B", 224) as engine:
            engine.step([_batch(2, 224)], 1e-4)
            local_results = [_stall(engine, folder, pairs), *_bandwidth(engine, folder, pairs)]
        return [*local_results, _under_faults(folder, min(pairs, 3)), _recovery(folder, min(pairs, 3))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _engine(size: str, image_size: int) -> Iterator[Any]:
    from pipeline import config as configs
    from pipeline.stages import stage_class
    from pipeline.stages.base import DataFacts, seeded_init
    from pipeline.train.config import OptimConfig
    from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine

    cls = stage_class("classify")
    model = {"size": size, "image_size": image_size}
    options = configs.validate(cls.options_class, {"model": model}, where="benchmark")
    seeded_init(0)
    stage = cls(options, DataFacts(("a", "b"), 64))
    engine = DeepSpeedEngine(stage, OptimConfig(lr=1e-4), zero_stage=2, precision="fp32", peak_lr=1e-4)
    try:
        yield engine
    finally:
        engine.close()


def _batch(size: int, image_size: int) -> Any:
    from pipeline.data.batch import Batch

    images = torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8)
    ids = torch.arange(size)
    return Batch(ids, ids, torch.ones(size), 0, images=images, labels=ids % 2)


class _Saver:
    """One save after the other into new folders, by our writer; the stall is over before the writing is."""

    def __init__(self, engine: Any, url: str) -> None:
        from pipeline.train.checkpoints import commits
        from pipeline.train.checkpoints.saving import CheckpointWriter

        self.engine = engine
        self.url = url
        attempt = commits.begin_attempt(url, 0, enforced=True)
        assert attempt is not None
        self.checkpoints = CheckpointWriter(url, attempt, keep_last=1, keep_every_samples=None, info={})
        self.step = 0

    def begin(self) -> None:
        """As the loop does after a step."""
        self.step += 1
        progress = {"step": self.step, "samples": self.step}
        self.checkpoints.save(self.step, list(self.engine.snapshot()), self.engine.facts(), progress)

    def stall(self) -> _Saver:
        """What the next step has to wait for."""
        self.begin()
        self.checkpoints.wait_copied()
        return self

    def whole(self) -> _Saver:
        """Until it is committed."""
        self.stall()
        self.settle()
        return self

    def settle_quietly(self) -> None:
        """Wait for what is under way, whether it fails or not."""
        while self.checkpoints.since() is not None:
            time.sleep(0.002)

    def settle(self) -> None:
        """Wait for what is under way."""
        self.settle_quietly()
        if self.checkpoints.num_failed:
            raise UnequalWork(f"a save failed: {self.checkpoints._last_failure}")


def _stall(engine: Any, folder: Path, pairs: int) -> Comparison:
    saver = _Saver(engine, str(folder / "ours"))
    theirs = folder / "deepspeed"

    def save_checkpoint() -> Path:
        shutil.rmtree(theirs, ignore_errors=True)
        engine._ds.save_checkpoint(str(theirs), tag="tag")
        return theirs

    def same(ours: _Saver, peer: Path) -> bool:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        from pipeline.train.checkpoints.restore import read_weights

        ours.settle()
        weights = read_weights(ours.url)
        consolidated = get_fp32_state_dict_from_zero_checkpoint(str(peer), tag="tag")
        return all(torch.equal(weights[name].view(-1), value.view(-1)) for name, value in consolidated.items())

    size = _state_bytes(engine)
    return compare(
        "checkpoint-stall",
        f"what a step waits for when a ViT-B under ZeRO-2 ({size / 2**20:.0f} MiB of state) is saved to disk",
        Contender("vitrail (copy to host memory)", saver.stall),
        Contender("DeepSpeed save_checkpoint", save_checkpoint),
        check=same,
        pairs=pairs,
        work=Work(size / 2**20, "MiB"),
        goal=Goal(ratio_min=10.0),
        notes={"check": "consolidated fp32 weights of both are equal bit for bit"},
    )


def _bandwidth(engine: Any, folder: Path, pairs: int) -> list[Comparison]:
    from pipeline.train.checkpoints.restore import load_newest

    size = _state_bytes(engine)
    data = os.urandom(2**20) * (size // 2**20)
    plain = folder / "plain.bin"
    saver = _Saver(engine, str(folder / "bandwidth"))

    def write() -> int:
        with plain.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return plain.stat().st_size

    def read() -> int:
        _forget(plain)
        return len(plain.read_bytes())

    def load() -> Any:
        for path in Path(saver.url).rglob("*.safetensors"):
            _forget(path)
        loaded = load_newest(saver.url, engine.wanted(), engine.facts())
        assert loaded is not None
        engine.restore(loaded[1])
        return loaded[0]

    mib = Work(size / 2**20, "MiB")
    saving = compare(
        "checkpoint-save-bandwidth",
        "a whole save until it is committed (copied, hashed, written, fsynced), beside writing as many bytes and fsync",
        Contender("vitrail save until commit", saver.whole),
        Contender("plain write and fsync", write),
        check=lambda ours, written: _stored(Path(ours.url)) >= written,
        pairs=pairs,
        work=mib,
    )
    loading = compare(
        "checkpoint-load-bandwidth",
        "reading, verifying and applying a checkpoint, beside reading as many bytes from disk (caches dropped)",
        Contender("vitrail load, verify, restore", load),
        Contender("plain read", read),
        check=lambda commit, size_read: sum(f["size_bytes"] for f in commit.document["files"]) >= size_read,
        pairs=pairs,
        work=mib,
    )
    return [saving, loading]


def _under_faults(folder: Path, pairs: int) -> Comparison:
    """99th percentile of the step time, with saves to a faulty S3 and without saves."""
    from launch.s3_server import S3Server
    from tests.support.fault_proxy import Fault, FaultProxy

    faults = [Fault("busy", 0.1), Fault("reset", 0.1), Fault("delay", 0.2, seconds=0.5), Fault("lost_reply", 0.05)]
    disturbed: list[float] = []
    calm: list[float] = []
    with (
        S3Server(folder / "s3") as server,
        FaultProxy(server.endpoint, faults) as proxy,
        _environment({**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}),
        _engine("Ti", 112) as engine,
    ):
        server.bucket("bench-bucket")
        batch = _batch(32, 112)
        saver = _Saver(engine, "s3://bench-bucket/checkpoints")
        _steps(engine, batch, None)
        for _ in range(pairs):
            disturbed.append(_percentile_99(_steps(engine, batch, saver)))
            saver.settle_quietly()
            calm.append(_percentile_99(_steps(engine, batch, None)))
        injected = dict(proxy.injected)
        failed = saver.checkpoints.num_failed
        saver.checkpoints.close()
    if sum(injected.values()) < 10:
        raise UnequalWork(f"only {injected} faults were met")
    return Comparison(
        name="checkpoint-faults",
        what=f"p99 of {NUM_STEPS} steps of a ViT-Ti, saved to S3 through a faulty proxy each {SAVE_EVERY}, beside none",
        ours="steps with saves that meet faults",
        peer="steps without saves",
        ours_s=tuple(disturbed),
        peer_s=tuple(calm),
        clock="wall",
        work=Work(),
        goal=Goal(ratio_min=round(1 / 1.2, 3)),
        warmup=1,
        notes={"injected": injected, "failed_saves": failed, "statistic": "99th percentile of a series, one a pair"},
    )


def _steps(engine: Any, batch: Any, saver: _Saver | None) -> list[float]:
    times = []
    for number in range(NUM_STEPS):
        began = time.perf_counter()
        if saver is not None:
            saver.checkpoints.wait_copied()
        engine.step([batch], 1e-4)
        if saver is not None and number % SAVE_EVERY == 0:
            saver.begin()
        times.append(time.perf_counter() - began)
    return times


def _recovery(folder: Path, pairs: int) -> Comparison:
    """From SIGKILL of a rank to the next step, beside the start of a run to its first step."""
    from tests.support import train_cases

    train_cases.write_data(folder)
    killed: list[float] = []
    cold: list[float] = []
    for pair in range(pairs):
        document = train_cases.document(folder, f"recovery-{pair}", length_samples=16 * 100_000)
        start_s, recover_s = _kill_once(document)
        cold.append(start_s)
        killed.append(recover_s)
    return Comparison(
        name="checkpoint-recovery",
        what="SIGKILL of one of two ranks to the next step, beside the same command's start to its first step",
        ours="kill to next step",
        peer="cold start to first step",
        ours_s=tuple(killed),
        peer_s=tuple(cold),
        clock="wall",
        work=Work(),
        goal=Goal(ratio_min=0.5),
        warmup=0,
        notes={},
    )


def _kill_once(document: dict[str, Any]) -> tuple[float, float]:
    import psutil

    from launch.stopping import StopRequest
    from launch.workers.attempts import run_training
    from launch.workers.group import LocalWorkerGroup
    from launch.workers.placement import RankPlacement
    from pipeline.run_dir import RunDir
    from pipeline.train.checkpoints.commits import find_commits

    stop = StopRequest()
    run_dir = RunDir(f"{document['runs']}/{document['name']}")
    job = threading.Thread(
        target=run_training,
        args=(document,),
        kwargs={
            "where": "benchmark",
            "run_url": run_dir.url,
            "allocate": lambda _: LocalWorkerGroup(RankPlacement(1, 2)),
            "stop": stop,
            "on_line": lambda rank, line: None,
        },
    )
    began = time.monotonic()
    job.start()
    _await(lambda: any(line["kind"] == "train" for line in run_dir.metrics()))
    start_s = time.monotonic() - began
    _await(lambda: find_commits(run_dir.checkpoints_url).commits)
    victim = next(
        p
        for p in psutil.Process().children(recursive=True)
        if "launch.worker" in p.cmdline() and p.environ().get("RANK") == "1"
    )
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _await(lambda: any(line["kind"] == "train" and line["attempt"] > 1 for line in run_dir.metrics()))
    recover_s = time.monotonic() - killed
    stop.request()
    job.join()
    return start_s, recover_s


def _await(probe: Callable[[], Any], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not probe():
        if time.monotonic() > deadline:
            raise UnequalWork("the run didn't get going")
        time.sleep(0.01)


def _state_bytes(engine: Any) -> int:
    return BYTES_PER_ELEMENT * sum(int(f.stop - f.start) for f in engine.snapshot())


def _stored(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _percentile_99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[98]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
