"""A training job from the driver's side: attempts, errors, stops; and what a cluster can't hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.stopping import StopRequest
from launch.workers.agent import AgentReport, RankExit
from launch.workers.attempts import JobFailedError, error_document, rebuild_error, run_training
from launch.workers.group import AgentLostError, LocalWorkerGroup
from launch.workers.placement import (
    ElasticPlacement,
    PlacementRequest,
    RankPlacement,
    check_feasible,
    check_fits,
    fit,
    parse_ranks,
    placement_for,
    without,
)
from pipeline.errors import ConfigError, DataError, ResourceError, StorageError, UserError
from pipeline.machine import Machine
from pipeline.run_dir import RunDir

DONE = {"status": "done", "step": 10, "samples": 80, "weights_sha256": "abc"}


class ScriptedGroup:
    """A group whose ranks do what a test says: the driver's side alone is under test here."""

    def __init__(self, reports: list[AgentReport | Callable[[], None]]) -> None:
        self.reports = reports
        self.change = ""
        self.machine = ""
        self.calls: list[str] = []

    def start(self, document: Any, where: str) -> None:
        self.calls.append("start")

    def poll(self) -> list[AgentReport]:
        while True:
            report = self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]
            if isinstance(report, AgentReport):
                return [report]
            report()

    def terminate(self) -> None:
        self.calls.append("terminate")

    def dump_stacks(self) -> None:
        self.calls.append("dump_stacks")

    def kill(self) -> None:
        self.calls.append("kill")

    def reason_to_move(self) -> str:
        return self.change

    def machine_of(self, rank: int) -> str:
        return self.machine

    def release(self) -> None:
        self.calls.append("release")


def ended(*codes: int, outcome: dict[str, Any] | None = None) -> AgentReport:
    return AgentReport([], [RankExit(rank, code, outcome or {}) for rank, code in enumerate(codes)], 0)


def job(run: Path, groups: list[ScriptedGroup], stop: StopRequest | None = None) -> tuple[Any, list[str]]:
    said: list[str] = []
    waiting = list(groups)
    result = run_training(
        {},
        where="x.yaml",
        run_url=str(run),
        allocate=lambda excluded: waiting.pop(0),
        stop=stop or StopRequest(),
        on_line=lambda rank, line: said.append(line),
    )
    return result, said


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.workers.attempts.POLL_S", 0.0)
    monkeypatch.setattr("launch.workers.attempts.PAUSE_S", 0.0)


def test_a_killed_rank_makes_a_new_attempt(tmp_path: Path) -> None:
    groups = [ScriptedGroup([ended(1, -9)]), ScriptedGroup([ended(0, 0, outcome=DONE)])]
    result, said = job(tmp_path, groups)
    assert (result.status, result.attempts, result.weights_sha256) == ("done", 2, "abc")
    assert any("rank 1 was ended by SIGKILL" in line for line in said)
    assert groups[0].calls == ["start", "release"]


def test_a_lost_agent_makes_a_new_attempt(tmp_path: Path) -> None:
    def lose() -> None:
        raise AgentLostError("machine died")

    result, said = job(tmp_path, [ScriptedGroup([lose]), ScriptedGroup([ended(0, outcome=DONE)])])
    assert result.attempts == 2
    assert any("machine died" in line for line in said)


def test_attempts_that_get_no_further_end_the_job(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match="3 attempts in a row got no further"):
        job(tmp_path, [ScriptedGroup([ended(1)]) for _ in range(9)])


def test_attempts_that_get_further_go_on(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    groups = [ScriptedGroup([lambda s=step: run.write_status(step=s), ended(-9)]) for step in range(1, 7)]
    result, _ = job(tmp_path, [*groups, ScriptedGroup([ended(0, outcome=DONE)])])
    assert result.attempts == 7


def test_a_users_error_ends_the_job_with_its_own_message(tmp_path: Path) -> None:
    error = DataError("too few samples", where="data", fix="give more")
    group = ScriptedGroup([ended(2, 2, outcome={"error": error_document(error)})])
    with pytest.raises(DataError, match=r"data error at data: too few samples\. Fix: give more"):
        job(tmp_path, [group])
    assert group.calls[-1] == "release"


def test_peers_of_a_dead_rank_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.workers.attempts.FAILURE_GRACE_S", 0.0)
    hanging = ScriptedGroup([AgentReport([], [RankExit(1, -9, {})], num_running=1)])
    job(tmp_path, [hanging, ScriptedGroup([ended(0, outcome=DONE)])])
    assert hanging.calls == ["start", "terminate", "kill", "release"]


def test_a_stop_request_reaches_the_ranks_and_stops_the_job(tmp_path: Path) -> None:
    stop = StopRequest()
    running = AgentReport([], [], num_running=2)
    stopped = ended(75, 75, outcome={"status": "stopped", "step": 4, "samples": 32})
    group = ScriptedGroup([running, stop.request, running, stopped])
    result, _ = job(tmp_path, [group], stop)
    assert (result.status, result.step) == ("stopped", 4)
    assert group.calls == ["start", "terminate", "release"]


def test_a_real_worker_refuses_a_wrong_configuration_once_for_all_ranks(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(ConfigError, match=r"mine\.yaml: length_sample: unknown key.*did you mean 'length_samples'"):
        run_training(
            {"length_sample": 3},
            where="mine.yaml",
            run_url=str(tmp_path / "run"),
            allocate=lambda _: LocalWorkerGroup(RankPlacement(machines=1, ranks_per_machine=2)),
            stop=StopRequest(),
            on_line=lambda rank, line: lines.append(line),
        )
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [ConfigError, DataError, StorageError, ResourceError, UserError])
def test_errors_travel_between_processes(kind: type[UserError]) -> None:
    error = kind("what", where="where", fix="fix")
    again = rebuild_error(error_document(error))
    assert type(again) is kind
    assert str(again) == str(error)


def test_what_a_cluster_cannot_hold_is_refused_with_the_shortfall() -> None:
    small, large = Machine("a", {"CPU": 2.0}), Machine("b", {"CPU": 8.0, "GPU": 4.0})
    check_feasible(RankPlacement(2, 2), [small, large])
    with pytest.raises(ResourceError, match=r"missing 16 CPU on one machine, of which the largest has 8"):
        check_feasible(RankPlacement(1, 4, cpus_per_rank=4), [small, large])
    with pytest.raises(ResourceError, match=r"missing 3 machines, of which there are 2"):
        check_feasible(RankPlacement(3, 1), [small, large])
    with pytest.raises(ResourceError, match=r"missing 2 machines that fit, of which there are 1"):
        check_feasible(RankPlacement(2, 1, gpus_per_rank=1), [small, large])


def test_signals_ask_once_and_handlers_are_given_back() -> None:
    import os
    import signal

    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    with stop.on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_change_of_the_cluster_saves_and_starts_again_without_counting_as_a_failure(tmp_path: Path) -> None:
    running = AgentReport([], [], num_running=2)
    saved = ended(75, 75, outcome={"status": "stopped", "step": 4, "samples": 32})
    groups = [ScriptedGroup([running, saved]) for _ in range(4)]
    for group in groups:
        group.change = "there is room for 3 ranks instead of 2"
    result, said = job(tmp_path, [*groups, ScriptedGroup([ended(0, outcome=DONE)])])
    assert (result.status, result.attempts) == ("done", 5)
    assert groups[0].calls == ["start", "terminate", "release"]
    assert any("room for 3 ranks" in line for line in said)


def test_a_hang_has_the_stacks_of_all_ranks_shown_before_they_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.workers.attempts.DUMP_S", 0.0)
    monkeypatch.setattr("launch.workers.attempts.FAILURE_GRACE_S", 0.0)
    hung = ScriptedGroup([AgentReport([], [RankExit(0, 1, {"hang": "step took more than its 4 s"})], num_running=1)])
    _, said = job(tmp_path, [hung, ScriptedGroup([ended(0, outcome=DONE)])])
    assert hung.calls == ["start", "dump_stacks", "terminate", "kill", "release"]
    assert any("rank 0 found the run hanging: step took more than its 4 s" in line for line in said)


def test_a_machine_that_fails_again_and_again_is_left_out(tmp_path: Path) -> None:
    exclusions: list[list[str]] = []
    groups = [ScriptedGroup([ended(-9)]) for _ in range(2)] + [ScriptedGroup([ended(0, outcome=DONE)])]
    for group in groups:
        group.machine = "badbadbad"

    def allocate(excluded: Any) -> ScriptedGroup:
        exclusions.append(list(excluded))
        return groups[len(exclusions) - 1]

    said: list[str] = []
    run_training(
        {},
        where="x.yaml",
        run_url=str(tmp_path),
        allocate=allocate,
        stop=StopRequest(),
        on_line=lambda rank, line: said.append(line),
    )
    assert exclusions == [[], [], ["badbadbad"]]
    assert any("isn't used any more" in line for line in said)


def test_a_run_that_was_going_waits_for_resources_and_a_new_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.workers.attempts.RESOURCE_POLL_S", 0.0)
    shortage = ResourceError("3 machines are wanted", where="Ray cluster", fix="add machines")
    answers: list[Any] = [ScriptedGroup([ended(-9)]), shortage, shortage, ScriptedGroup([ended(0, outcome=DONE)])]

    def allocate(excluded: Any) -> ScriptedGroup:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        group: ScriptedGroup = answer
        return group

    said: list[str] = []
    settings: dict[str, Any] = {"where": "x", "run_url": str(tmp_path), "allocate": allocate, "stop": StopRequest()}
    result = run_training({}, **settings, on_line=lambda rank, line: said.append(line))
    assert (result.status, result.attempts) == ("done", 2)
    assert sum("waiting up to 10 min for resources: 3 machines are wanted" in line for line in said) == 1
    answers.append(shortage)
    with pytest.raises(ResourceError):
        run_training({}, **settings, on_line=lambda rank, line: None)


def four(*cores: float) -> list[Machine]:
    return [Machine(f"machine{i}", {"CPU": c}, f"10.0.0.{i}") for i, c in enumerate(cores)]


def test_an_elastic_job_takes_the_largest_world_that_divides_the_batch() -> None:
    wanted = ElasticPlacement(1, 8, global_batch=12)
    assert fit(wanted, four(1, 1, 1)) == RankPlacement(3, 1)
    assert fit(wanted, four(4, 1)) == RankPlacement(1, 4)
    assert fit(wanted, four(5)) == RankPlacement(1, 4), "5 doesn't divide 12"
    assert fit(wanted, four(2, 2, 2)) == RankPlacement(3, 2)
    assert fit(wanted._replace(maximum=3), four(2, 2, 2)) == RankPlacement(3, 1)
    assert fit(wanted._replace(cpus_per_rank=2), four(5, 3)) == RankPlacement(1, 2, 2)
    assert fit(wanted, []) is None
    gpus = [Machine("g", {"CPU": 64.0, "GPU": 4.0})]
    assert fit(wanted._replace(gpus_per_rank=1), gpus) == RankPlacement(1, 4, 1, 1)


def test_what_an_elastic_job_lacks_is_named() -> None:
    with pytest.raises(ResourceError, match=r"at least 4 rank\(s\) with 1 core\(s\) are wanted, .* room for 2"):
        check_fits(ElasticPlacement(4, 8, global_batch=12), four(1, 1))
    with pytest.raises(ConfigError, match="no world of 5 to 5 ranks divides the global batch of 12"):
        check_fits(ElasticPlacement(5, 5, global_batch=12), four(8))


@pytest.mark.parametrize(("text", "count"), [("4", 4), ("2:8", (2, 8)), ("3:3", (3, 3))])
def test_ranks_are_a_number_or_a_range(text: str, count: object) -> None:
    assert parse_ranks(text) == count


@pytest.mark.parametrize("text", ["", "0", "a", "4:2", "0:2", ":3", "3:", "1:2:3", "-1"])
def test_other_ranks_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="MIN:MAX"):
        parse_ranks(text)


def test_machines_are_excluded_by_id_or_address() -> None:
    machines = four(1, 1, 1)
    assert [m.id for m in without(machines, ["machine0", "10.0.0.2"])] == ["machine1"]
    assert without(machines, [""]) == machines


def test_by_default_there_is_a_rank_for_each_gpu_of_a_machine_and_cores_are_shared_out() -> None:
    machines = [Machine(f"m{i}", {"CPU": 16.0, "GPU": 2.0}) for i in range(4)]
    assert placement_for(PlacementRequest(machines=4), machines, 64) == RankPlacement(4, 2, 8, 1)
    assert placement_for(PlacementRequest(), machines, 64) == RankPlacement(1, 2, 8, 1)
    assert placement_for(PlacementRequest(machines=4, ranks=1), machines, 64) == RankPlacement(4, 1, 16, 1)
    assert placement_for(PlacementRequest(ranks=2, cpus_per_rank=3), machines, 64) == RankPlacement(1, 2, 3, 1)


def test_without_gpus_one_rank_takes_a_machines_cores() -> None:
    machines = four(4, 4)
    assert placement_for(PlacementRequest(), machines, 64) == RankPlacement(1, 1, 4)
    assert placement_for(PlacementRequest(machines=2, ranks=2), machines, 64) == RankPlacement(2, 2, 2)


def test_the_weakest_of_the_best_machines_decides() -> None:
    machines = [Machine("large", {"CPU": 32.0, "GPU": 8.0}), Machine("head", {"CPU": 8.0})]
    machines += [Machine("small", {"CPU": 16.0, "GPU": 4.0})]
    assert placement_for(PlacementRequest(machines=2), machines, 64) == RankPlacement(2, 4, 4, 1)
    assert placement_for(PlacementRequest(machines=1), machines, 64) == RankPlacement(1, 8, 4, 1)
    assert placement_for(PlacementRequest(machines=3), machines, 64) == RankPlacement(3, 1, 8, 0)


def test_more_ranks_than_gpus_are_left_to_the_refusal() -> None:
    wanted = placement_for(PlacementRequest(ranks=4), [Machine("m", {"CPU": 8.0, "GPU": 2.0})], 64)
    assert wanted == RankPlacement(1, 4, 2, 1)
    with pytest.raises(ResourceError, match="missing 4 GPU on one machine, of which the largest has 2"):
        check_feasible(wanted, [Machine("m", {"CPU": 8.0, "GPU": 2.0})])


def test_elastic_ranks_take_a_gpu_and_its_share_of_the_cores() -> None:
    machines = [
        Machine("a", {"CPU": 16.0, "GPU": 2.0}),
        Machine("b", {"CPU": 8.0, "GPU": 2.0}),
        Machine("c", {"CPU": 2.0}),
    ]
    assert placement_for(PlacementRequest(ranks=(1, 4)), machines, 64) == ElasticPlacement(1, 4, 64, 4, 1)
    assert placement_for(PlacementRequest(ranks=(1, 4)), four(2, 2), 64) == ElasticPlacement(1, 4, 64, 1, 0)
