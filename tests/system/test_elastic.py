"""Three Ray nodes on this machine: one is lost in mid-epoch with its worker, and comes back; the run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.run_dir import RunDir
from tests.support import train_cases
from tests.support.tiny_chain import Command, commits, wait_for
from tests.unit.data.conftest import numbered, write_data_set

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NUM_SAMPLES, GLOBAL_BATCH, NUM_EPOCHS = 96, 12, 8

# What the ranks were given, by position in the run; and steps slow enough to be interrupted.
RECORDER = """
import json, os, time
if "RANK" in os.environ:
    import pipeline.data.loader as loader
    steps = loader.Loader.steps
    def recording(self, start):
        with open(os.path.join({folder!r}, f"seen-{{os.getpid()}}.jsonl"), "a", buffering=1) as file:
            for step in steps(self, start):
                for batch in step.micro:
                    line = {{"rank": int(os.environ["RANK"]), "world": int(os.environ["WORLD_SIZE"])}}
                    print(json.dumps({{**line, "position": batch.position, "ids": batch.ids.tolist()}}), file=file)
                time.sleep(0.4)
                yield step
    loader.Loader.steps = recording
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data_set(str(tmp_path / "train"), numbered([60, 36]))
    write_data_set(str(tmp_path / "heldout"), numbered([10]))
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "sitecustomize.py").write_text(RECORDER.format(folder=str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'record'}:{train_cases.REPOSITORY}")
    return tmp_path


@pytest.fixture
def cluster(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head and two nodes, each with one core to give."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    try:
        for _ in range(2):
            add(nodes)
        yield nodes
    finally:
        nodes.shutdown()


def add(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=80 << 20)


def test_a_lost_node_costs_a_worker_and_no_sample_and_its_return_brings_it_back(place: Path, cluster: Any) -> None:
    changes = {
        "data.global_batch": GLOBAL_BATCH,
        "length_samples": NUM_EPOCHS * NUM_SAMPLES,
        "checkpoint.every_samples": 3 * GLOBAL_BATCH,
    }
    document = train_cases.document(place, "elastic", **changes)
    (place / "elastic.yaml").write_text(yaml.safe_dump(document))
    run = RunDir(f"{document['runs']}/elastic")
    checkpoints = Path(run.checkpoints_url)
    command = Command("train", "elastic.yaml", "--ranks", "1:3", "--ray", cluster.address, "--json", cwd=place)
    try:
        wait_for(lambda: len(commits(checkpoints)) >= 1, "a checkpoint of three workers")
        assert run.status()["world_size"] == 3
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        wait_for(lambda: run.status().get("world_size") == 2, "an attempt with two workers")
        reached = commits(checkpoints)[-1]
        wait_for(lambda: commits(checkpoints)[-1] > reached, "progress of two workers")
        add(cluster)
        wait_for(lambda: run.status().get("world_size") == 3, "an attempt with three workers again")
        drain(cluster)
        wait_for(lambda: run.status().get("world_size") == 2, "an attempt without the node that is about to leave")
        code, answer = command.finish()
    finally:
        command.kill_everything()
    assert code == 0, command.said
    num_steps = NUM_EPOCHS * NUM_SAMPLES // GLOBAL_BATCH
    assert (answer["status"], answer["step"]) == ("done", num_steps)
    assert "room for 3 ranks instead of 2: saving, to start again" in command.said
    assert "is being drained: saving, to start again" in command.said
    assert [line["step"] for line in run.metrics() if line["kind"] == "train"] == list(range(1, num_steps + 1))
    check_samples(place, num_steps)


def drain(cluster: Any) -> None:
    """Announce that one of the nodes will leave, as a cloud does before it takes a machine back."""
    node = next(iter(cluster.worker_nodes))
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", "--deadline-remaining-seconds"]
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "drain-node", "--address", cluster.address, "--node-id", node.node_id, *reason, "600"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def check_samples(place: Path, num_steps: int) -> None:
    """Each step's samples are the same in whichever attempts went through it; each epoch holds every sample once."""
    seen: dict[tuple[int, int, str], list[int]] = {}
    for path in place.glob("seen-*.jsonl"):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            seen.setdefault((line["position"], line["world"], path.stem), []).extend(line["ids"])
    by_step: dict[int, list[int]] = {}
    for position in range(0, num_steps * GLOBAL_BATCH, GLOBAL_BATCH):
        for world in (2, 3):
            parts = [ids for (at, size, _), ids in seen.items() if (at, size) == (position, world)]
            if len(parts) == world:
                ids = sorted(i for part in parts for i in part)
                assert by_step.setdefault(position, ids) == ids, f"other samples at {position} on {world} ranks"
    assert sorted(by_step) == list(range(0, num_steps * GLOBAL_BATCH, GLOBAL_BATCH)), "a step nobody took whole"
    steps_per_epoch = NUM_SAMPLES // GLOBAL_BATCH
    for epoch in range(NUM_EPOCHS):
        positions = sorted(by_step)[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        assert sorted(i for at in positions for i in by_step[at]) == list(range(NUM_SAMPLES)), f"epoch {epoch}"
