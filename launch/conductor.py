"""Runs a chain: finished nodes are skipped, ready ones start as resources allow, anything may be killed at any time.

What is finished is written under `<work>/nodes/`, one JSON file a node, after its output is complete; a node that was
interrupted is simply run again, and resumes by its own means (shards that are there, checkpoints). Training nodes run
on agents, driven by a thread here; all others are child processes (`python -m launch.node`).
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from launch import cluster
from launch.attempts import JobFailedError, describe_exit, error_document, rebuild_error, run_training
from launch.chain import Chain, Node
from launch.crew import RayCrew
from launch.layout import Elastic, Layout
from launch.progress import AttemptTeller, figures_of, headline, training_progress
from launch.stopping import StopRequest
from pipeline import config as configs
from pipeline import storage
from pipeline.errors import ConfigError, ResourceError, UserError
from pipeline.train.config import TrainConfig

PROGRESS_EVERY_S = 10.0
_TERMINATE_GRACE_S = 10.0
_COUNTS = {"num_scenes": "scenes", "inputs": "inputs", "written": "written", "step": "steps"}

Say = Callable[[str], None]


class NodeResult(NamedTuple):
    """What became of one node."""

    name: str
    state: Literal["done", "skipped", "stopped", "failed", "not started"]
    output: str
    seconds: float = 0.0
    summary: dict[str, Any] = {}
    error: UserError | JobFailedError | None = None


class _Record(NamedTuple):
    """The state file of a node."""

    state: Literal["started", "done"]
    fingerprint: str
    output: str
    seconds: float = 0.0
    summary: dict[str, Any] = {}


class Conductor:
    """Runs the nodes of one chain from one process.

    Args:
        chain: what to run.
        ray_address: of an existing Ray; None: RAY_ADDRESS, else embedded, started when a node needs it.
        say: takes lines for the person watching.
    """

    def __init__(self, chain: Chain, *, stop: StopRequest, say: Say, ray_address: str | None = None) -> None:
        self._chain = chain
        self._stop = stop
        self._say = say
        self._ray_address = ray_address
        self._cluster: cluster.Cluster | None = None
        self._folder = chain.places.work / "nodes"
        self._results: dict[str, NodeResult] = {}
        self._running: dict[str, Layout | None] = {}
        self._ended: queue.Queue[NodeResult] = queue.Queue()

    def run(self, redo: Iterable[str] = ()) -> dict[str, NodeResult]:
        """Run whatever isn't finished; call it in the main thread, with the chain's lock held.

        Args:
            redo: nodes to do over, with all that build on them; their outputs are deleted first.

        Raises:
            ConfigError: a node that was begun or finished has another configuration now, or `redo` names none.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._discard(redo)
        for name, node in self._chain.nodes.items():
            self._check_unchanged(node)
            record = self._record(name)
            if record is not None and record.state == "done":
                self._results[name] = NodeResult(name, "skipped", record.output, record.seconds, record.summary)
        if self._results:
            self._say(f"finished before: {', '.join(self._results)}")
        while True:
            self._start_ready()
            if not self._running:
                break
            self._collect(self._ended.get())
        for name, node in self._chain.nodes.items():
            self._results.setdefault(name, NodeResult(name, "not started", node.output))
        return {name: self._results[name] for name in self._chain.nodes}

    def _start_ready(self) -> None:
        if self._stop.requested() or any(r.state == "failed" for r in self._results.values()):
            return
        for node in self._chain.nodes.values():
            if node.name in self._results or node.name in self._running or not self._is_ready(node):
                continue
            if _needs_ray(node) and self._cluster is None:
                try:
                    self._connect()
                except UserError as error:
                    self._results[node.name] = NodeResult(node.name, "failed", node.output, error=error)
                    return
            layout = self._layout(node)
            if self._fits(node, layout):
                self._start(node, layout)

    def _is_ready(self, node: Node) -> bool:
        return all(before in self._results for before in node.after)

    def _connect(self) -> None:
        self._cluster = cluster.connect(self._ray_address)
        self._stop.take_signals()  # Ray put its own handlers in their place
        os.environ["RAY_ADDRESS"] = self._cluster.address  # for children

    def _layout(self, node: Node) -> Layout | None:
        """What a training node takes; None for the others."""
        if node.kind != "train":
            return None
        assert self._cluster is not None
        gpus = self._cluster.num_gpus
        workers = node.workers if isinstance(node.workers, int) else None
        workers = workers or gpus or self._cluster.num_cpus
        if isinstance(node.workers, tuple):  # what it may take at most, on the cluster taken together
            workers = node.workers[1]
        return Layout(node.nodes, workers, node.cpus_per_worker or 1, gpus_per_worker=1 if gpus else 0)

    def _elastic(self, node: Node, layout: Layout) -> Elastic | None:
        """What an elastic node asks for; None for one with a fixed number of workers."""
        if not isinstance(node.workers, tuple):
            return None
        batch = int(node.document["data"]["global_batch"])
        return Elastic(*node.workers, batch, layout.cpus_per_worker, layout.gpus_per_worker)

    def _fits(self, node: Node, layout: Layout | None) -> bool:
        """Whether the node can run beside those that do; alone it may always try."""
        if not self._running:
            return True
        if layout is None or None in self._running.values() or self._cluster is None:
            return False
        layouts = [layout, *(other for other in self._running.values() if other is not None)]
        cores = sum(one.world_size * one.cpus_per_worker for one in layouts)
        gpus = sum(one.world_size * one.gpus_per_worker for one in layouts)
        return cores <= self._cluster.num_cpus and gpus <= self._cluster.num_gpus

    def _start(self, node: Node, layout: Layout | None) -> None:
        again = self._record(node.name) is not None
        self._say(f"{node.name}: {'going on' if again else 'starting'} ({node.kind})")
        self._write_record(node.name, _Record("started", node.fingerprint, node.output))
        self._running[node.name] = layout
        threading.Thread(target=self._run_node, args=(node, layout), name=node.name, daemon=True).start()

    def _run_node(self, node: Node, layout: Layout | None) -> None:
        started = time.monotonic()
        result = NodeResult(node.name, "done", node.output)
        try:
            with (self._folder / f"{node.name}.log").open("a", encoding="utf-8") as log:
                if layout is not None:
                    state, summary = self._train(node, layout, log)
                else:
                    state, summary = self._run_child(node, log)
            result = result._replace(state=state, summary=summary)
        except (UserError, JobFailedError) as error:
            result = result._replace(state="failed", error=error)
        except Exception as error:  # a defect of ours must not leave the main thread waiting for ever
            result = result._replace(state="failed", error=JobFailedError(f"{type(error).__name__}: {error}"))
            sys.excepthook(type(error), error, error.__traceback__)
        self._ended.put(result._replace(seconds=time.monotonic() - started))

    def _collect(self, result: NodeResult) -> None:
        del self._running[result.name]
        self._results[result.name] = result
        node = self._chain.nodes[result.name]
        if result.state == "done":
            record = _Record("done", node.fingerprint, node.output, result.seconds, result.summary)
            self._write_record(result.name, record)
            self._say(f"{result.name}: done in {result.seconds:.0f} s{_in_short(result.summary)}")
        elif result.state == "stopped":
            self._say(f"{result.name}: stopped; the same command goes on from here")
        else:
            self._say(f"{result.name}: failed: {result.error}")
            if others := ", ".join(self._running):
                self._say(f"letting {others} finish; nothing else will be started")

    def _train(self, node: Node, layout: Layout, log: IO[str]) -> tuple[Literal["done", "stopped"], dict[str, Any]]:
        config = configs.validate(TrainConfig, node.document, where=node.where)
        attempts = AttemptTeller(config.run_url)

        def on_line(rank: int, line: str) -> None:
            log.write(f"{line}\n" if rank < 0 else f"[{rank}] {line}\n")
            log.flush()
            if rank < 0:
                self._say(f"{node.name}: {line}")
            elif rank == 0 and (news := attempts.news()):
                self._say(f"{node.name}: {news}")

        with self._telling_progress(node.name, lambda: training_progress(config.run_url)):
            result = run_training(
                node.document,
                where=node.where,
                run_url=config.run_url,
                hire=lambda excluded: RayCrew(self._elastic(node, layout) or layout, excluded=excluded),
                stop=self._stop,
                on_line=on_line,
                max_fruitless=config.max_fruitless_attempts,
            )
        summary: dict[str, Any] = {"step": result.step, "samples": result.samples}
        if result.status == "done":
            summary |= {"weights_sha256": result.weights_sha256, "figures": figures_of(config.run_url)}
        return result.status, summary

    def _run_child(self, node: Node, log: IO[str]) -> tuple[Literal["done", "stopped"], dict[str, Any]]:
        request = {"kind": node.kind, "document": node.document, "where": node.where, "output": node.output}
        child = subprocess.Popen(
            [sys.executable, "-m", "launch.node"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the driver
            env={**os.environ, "VITRAIL_PARENT": str(os.getpid())},  # it ends with this thread, which waits for it
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        json.dump(request, child.stdin)
        child.stdin.close()
        last = _LastLine()
        reader = threading.Thread(target=_copy_lines, args=(child.stderr, log, last), daemon=True)
        reader.start()
        answer: list[str] = []
        listener = threading.Thread(target=lambda out=child.stdout: answer.append(out.read()), daemon=True)
        listener.start()
        with self._telling_progress(node.name, lambda: last.text):
            while child.poll() is None:
                if self._stop.wait(0.1):
                    _end(child)
        reader.join(timeout=2)
        listener.join(timeout=2)
        if self._stop.requested() and child.returncode != 0:
            return "stopped", {}
        reply = _last_json("".join(answer))
        if child.returncode == 0:
            return "done", reply
        if "error" in reply:
            raise rebuild_error(reply["error"])
        raise JobFailedError(f"its process {describe_exit(child.returncode)}; see {log.name}: {last.text}")

    @contextmanager
    def _telling_progress(self, name: str, progress: Callable[[], str]) -> Iterator[None]:
        """Within the block, say now and then how far the node is, when that has changed."""
        ended = threading.Event()

        def tell() -> None:
            before = progress()
            while not ended.wait(PROGRESS_EVERY_S):
                now = progress()
                if now and now != before:
                    self._say(f"{name}: {now}")
                before = now

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join(timeout=1)

    def _check_unchanged(self, node: Node) -> None:
        record = self._record(node.name)
        if record is None or record.fingerprint == node.fingerprint:
            return
        if record.state != "done" and not self._has_output(node):  # nothing to go on from
            (self._folder / f"{node.name}.json").unlink()
            return
        done = "finished" if record.state == "done" else "begun"
        raise ConfigError(
            f"node {node.name!r} was {done} with another configuration (its own, or that of a node before it)",
            where=f"{self._chain.where} in {self._chain.places.work}",
            fix=f"undo the change, use another --work folder, or do it over with --redo {node.name}",
        )

    def _has_output(self, node: Node) -> bool:
        places = node.output, storage.join(self._chain.places.store, "checkpoints", node.name)
        return any(True for place in places for _ in storage.entries(place))

    def _discard(self, redo: Iterable[str]) -> None:
        """Forget the nodes named and what builds on them, outputs included."""
        names = list(redo)
        for name in names:
            if name not in self._chain.nodes:
                raise ConfigError(
                    f"no node {name!r}", where="--redo", fix=f"name one of {', '.join(self._chain.nodes)}"
                )
        places = self._chain.places
        for name in sorted(self._chain.downstream(names)) if names else ():
            node = self._chain.nodes[name]
            if node.kind in ("scenes", "prep") and node.output != places.output(node.kind, name):
                raise ConfigError(
                    f"node {name!r} writes to a place of its own", where=node.output, fix="delete that folder by hand"
                )
            self._say(f"{name}: doing it over")
            delete_tree(node.output)
            delete_tree(storage.join(places.store, "checkpoints", name))
            (self._folder / f"{name}.json").unlink(missing_ok=True)

    def _record(self, name: str) -> _Record | None:
        return _read_record(self._chain, name)

    def _write_record(self, name: str, record: _Record) -> None:
        path = self._folder / f"{name}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record._asdict(), indent=1), encoding="utf-8")
        os.replace(temporary, path)


def _needs_ray(node: Node) -> bool:
    if node.kind == "prep":
        return bool(node.document.get("ray", {}).get("workers") != 0)
    return node.kind == "train"


def state_of(chain: Chain, name: str) -> Literal["new", "begun", "finished"]:
    """How far a node got in earlier runs of the chain, by its own account."""
    record = _read_record(chain, name)
    if record is None:
        return "new"
    return "finished" if record.state == "done" else "begun"


def exit_code(results: dict[str, NodeResult]) -> int:
    """Of the command that ran a chain: 0 done, 2 a user's error, 75 stopped, 1 anything else."""
    errors = [r.error for r in results.values() if r.state == "failed"]
    if errors:
        return 2 if all(isinstance(error, UserError) for error in errors) else 1
    return 75 if any(r.state in ("stopped", "not started") for r in results.values()) else 0


def results_document(results: dict[str, NodeResult]) -> dict[str, Any]:
    """The results as JSON."""
    document = {}
    for name, result in results.items():
        document[name] = {**result._asdict(), "error": None}
        if isinstance(result.error, UserError):
            document[name]["error"] = error_document(result.error)
        elif result.error is not None:
            document[name]["error"] = str(result.error)
    return document


@contextmanager
def only_one(work: Path) -> Iterator[None]:
    """Hold the work folder's lock, which ends with the process.

    Raises:
        ResourceError: another process holds it.
    """
    from filelock import FileLock, Timeout

    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ResourceError(
            "another command is running in this folder",
            where=str(work),
            fix="wait for it, or use another --work folder",
        ) from None
    try:
        yield
    finally:
        lock.release()


def delete_tree(url: str) -> None:
    """Delete a folder, or everything under an s3:// prefix."""
    if not storage.is_remote(url):
        shutil.rmtree(url, ignore_errors=True)
        return
    try:
        for entry in list(storage.entries(url)):
            storage.delete(entry.url)
    except FileNotFoundError:
        pass


def _in_short(summary: dict[str, Any]) -> str:
    """What a person wants to see of a node's summary at once."""
    counts = [f"{summary[key]} {noun}" for key, noun in _COUNTS.items() if key in summary]
    figures = [f"{name} {value:.4g}" for name, value in headline(summary.get("figures", {})).items()]
    return "".join(f", {part}" for part in [*counts, *figures])


def _read_record(chain: Chain, name: str) -> _Record | None:
    try:
        return _Record(**json.loads((chain.places.work / "nodes" / f"{name}.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


class _LastLine:
    """The newest line a child printed."""

    text = ""


def _copy_lines(stream: IO[str], log: IO[str], last: _LastLine) -> None:
    for line in stream:
        log.write(line)
        log.flush()
        if line.strip():
            last.text = line.strip()


def _end(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.wait(timeout=_TERMINATE_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _last_json(text: str) -> dict[str, Any]:
    """The JSON object on the last line that holds one; {} when none does."""
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}
