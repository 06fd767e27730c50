"""Where ranks go on a cluster of four machines with two GPUs each: real raylets, with GPUs by their word alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import train_cases
from tests.support.tiny_chain import Command

ALLOCATE = """
import json, sys
from pipeline import ray_cluster
from launch.chain.graph import load_chain
from launch.workers.group import allocator

ray_cluster.connect(sys.argv[1])
step = load_chain("chain.yaml").steps["mae"]
group = allocator(step.request, step.document["data"]["global_batch"])([])
machines = [group.machine_of(rank) for rank in range(8)]
print(json.dumps({"world_size": group.placement.world_size, "machines": machines, "takes": group.placement.bundle}))
group.release()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Four machines, each offering four cores and two GPUs."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # raylets offer no more GPUs than it names
        offers = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 80 << 20}
        machines = Cluster(initialize_head=True, head_node_args=offers)
        try:
            for _ in range(3):
                machines.add_node(**offers)
            yield machines
        finally:
            machines.shutdown()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A chain of one training step that says how many machines it wants, and nothing of ranks."""
    train_cases.write_data(tmp_path)
    document = train_cases.document(tmp_path, "mae", length_samples=64, **{"data.global_batch": 16})
    chain = {"nodes": {"mae": {"kind": "train", "config": document, "nodes": 4}}}  # as version 0.1.0 called them
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    return tmp_path


def test_four_machines_with_two_gpus_each_get_eight_ranks(place: Path, cluster: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": str(train_cases.REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE, cluster.address],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["world_size"] == 8
    assert answer["takes"] == {"CPU": 4.0, "GPU": 2.0}, "each machine's cores are shared out among its ranks"
    by_machine = [answer["machines"][i : i + 2] for i in range(0, 8, 2)]
    assert all(first == second for first, second in by_machine)
    assert len({machines[0] for machines in by_machine}) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_eight_ranks_train(place: Path, cluster: Any) -> None:
    command = Command("run", "chain.yaml", "--ray", cluster.address, "--json", cwd=place)
    try:
        code, answer = command.finish(timeout_s=800)
    finally:
        command.kill_everything()
    assert code == 0, command.said
    assert answer["steps"]["mae"]["state"] == "done"
    (resolved,) = (place / "runs").glob("chain/runs/mae/resolved.yaml")
    assert yaml.safe_load(resolved.read_text())["world_size"] == 8
