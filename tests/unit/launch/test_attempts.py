"""A training job from the driver's side: attempts, errors, stops; and what a cluster can't hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.agents import Exit, Report
from launch.attempts import JobFailedError, error_document, rebuild_error, run_training
from launch.crew import AgentLostError, LocalCrew
from launch.layout import Elastic, Layout, NodeFacts, check_feasible, check_fits, fit, parse_workers, without
from launch.stopping import StopRequest
from pipeline.errors import ConfigError, DataError, ResourceError, StorageError, UserError
from pipeline.run_dir import RunDir

DONE = {"status": "done", "step": 10, "samples": 80, "weights_sha256": "abc"}


class ScriptedCrew:
    """A crew whose ranks do what a test says: the driver's side alone is under test here."""

    def __init__(self, reports: list[Report | Callable[[], None]]) -> None:
        self.reports = reports
        self.change = ""
        self.node = ""
        self.calls: list[str] = []

    def start(self, document: Any, where: str) -> None:
        self.calls.append("start")

    def poll(self) -> list[Report]:
        while True:
            report = self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]
            if isinstance(report, Report):
                return [report]
            report()

    def terminate(self) -> None:
        self.calls.append("terminate")

    def dump_stacks(self) -> None:
        self.calls.append("dump_stacks")

    def kill(self) -> None:
        self.calls.append("kill")

    def wants_change(self) -> str:
        return self.change

    def node_of(self, rank: int) -> str:
        return self.node

    def dismiss(self) -> None:
        self.calls.append("dismiss")


def ended(*codes: int, outcome: dict[str, Any] | None = None) -> Report:
    return Report([], [Exit(rank, code, outcome or {}) for rank, code in enumerate(codes)], 0)


def job(run: Path, crews: list[ScriptedCrew], stop: StopRequest | None = None) -> tuple[Any, list[str]]:
    said: list[str] = []
    waiting = list(crews)
    result = run_training(
        {},
        where="x.yaml",
        run_url=str(run),
        hire=lambda excluded: waiting.pop(0),
        stop=stop or StopRequest(),
        on_line=lambda rank, line: said.append(line),
    )
    return result, said


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.attempts.POLL_S", 0.0)
    monkeypatch.setattr("launch.attempts.PAUSE_S", 0.0)


def test_a_killed_rank_makes_a_new_attempt(tmp_path: Path) -> None:
    crews = [ScriptedCrew([ended(1, -9)]), ScriptedCrew([ended(0, 0, outcome=DONE)])]
    result, said = job(tmp_path, crews)
    assert (result.status, result.attempts, result.weights_sha256) == ("done", 2, "abc")
    assert any("rank 1 was ended by SIGKILL" in line for line in said)
    assert crews[0].calls == ["start", "dismiss"]


def test_a_lost_agent_makes_a_new_attempt(tmp_path: Path) -> None:
    def lose() -> None:
        raise AgentLostError("node died")

    result, said = job(tmp_path, [ScriptedCrew([lose]), ScriptedCrew([ended(0, outcome=DONE)])])
    assert result.attempts == 2
    assert any("node died" in line for line in said)


def test_attempts_that_get_no_further_end_the_job(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match="3 attempts in a row got no further"):
        job(tmp_path, [ScriptedCrew([ended(1)]) for _ in range(9)])


def test_attempts_that_get_further_go_on(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    crews = [ScriptedCrew([lambda s=step: run.write_status(step=s), ended(-9)]) for step in range(1, 7)]
    result, _ = job(tmp_path, [*crews, ScriptedCrew([ended(0, outcome=DONE)])])
    assert result.attempts == 7


def test_a_users_error_ends_the_job_with_its_own_message(tmp_path: Path) -> None:
    error = DataError("too few samples", where="data", fix="give more")
    crew = ScriptedCrew([ended(2, 2, outcome={"error": error_document(error)})])
    with pytest.raises(DataError, match=r"data error at data: too few samples\. Fix: give more"):
        job(tmp_path, [crew])
    assert crew.calls[-1] == "dismiss"


def test_peers_of_a_dead_rank_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.attempts.FAILURE_GRACE_S", 0.0)
    hanging = ScriptedCrew([Report([], [Exit(1, -9, {})], num_running=1)])
    job(tmp_path, [hanging, ScriptedCrew([ended(0, outcome=DONE)])])
    assert hanging.calls == ["start", "terminate", "kill", "dismiss"]


def test_a_stop_request_reaches_the_ranks_and_stops_the_job(tmp_path: Path) -> None:
    stop = StopRequest()
    running = Report([], [], num_running=2)
    stopped = ended(75, 75, outcome={"status": "stopped", "step": 4, "samples": 32})
    crew = ScriptedCrew([running, stop.request, running, stopped])
    result, _ = job(tmp_path, [crew], stop)
    assert (result.status, result.step) == ("stopped", 4)
    assert crew.calls == ["start", "terminate", "dismiss"]


def test_a_real_worker_refuses_a_wrong_configuration_once_for_all_ranks(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(ConfigError, match=r"mine\.yaml: length_sample: unknown key.*did you mean 'length_samples'"):
        run_training(
            {"length_sample": 3},
            where="mine.yaml",
            run_url=str(tmp_path / "run"),
            hire=lambda _: LocalCrew(Layout(nodes=1, workers_per_node=2)),
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
    small, large = NodeFacts("a", {"CPU": 2.0}), NodeFacts("b", {"CPU": 8.0, "GPU": 4.0})
    check_feasible(Layout(2, 2), [small, large])
    with pytest.raises(ResourceError, match=r"missing 16 CPU on one node, of which the largest has 8"):
        check_feasible(Layout(1, 4, cpus_per_worker=4), [small, large])
    with pytest.raises(ResourceError, match=r"missing 3 nodes, of which there are 2"):
        check_feasible(Layout(3, 1), [small, large])
    with pytest.raises(ResourceError, match=r"missing 2 nodes that fit, of which there are 1"):
        check_feasible(Layout(2, 1, gpus_per_worker=1), [small, large])


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
    running = Report([], [], num_running=2)
    saved = ended(75, 75, outcome={"status": "stopped", "step": 4, "samples": 32})
    crews = [ScriptedCrew([running, saved]) for _ in range(4)]
    for crew in crews:
        crew.change = "there is room for 3 workers instead of 2"
    result, said = job(tmp_path, [*crews, ScriptedCrew([ended(0, outcome=DONE)])])
    assert (result.status, result.attempts) == ("done", 5)
    assert crews[0].calls == ["start", "terminate", "dismiss"]
    assert any("room for 3 workers" in line for line in said)


def test_a_hang_has_the_stacks_of_all_ranks_shown_before_they_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.attempts.DUMP_S", 0.0)
    monkeypatch.setattr("launch.attempts.FAILURE_GRACE_S", 0.0)
    hung = ScriptedCrew([Report([], [Exit(0, 1, {"hang": "step took more than its 4 s"})], num_running=1)])
    _, said = job(tmp_path, [hung, ScriptedCrew([ended(0, outcome=DONE)])])
    assert hung.calls == ["start", "dump_stacks", "terminate", "kill", "dismiss"]
    assert any("rank 0 found the run hanging: step took more than its 4 s" in line for line in said)


def test_a_node_that_fails_again_and_again_is_left_out(tmp_path: Path) -> None:
    asked: list[list[str]] = []
    crews = [ScriptedCrew([ended(-9)]) for _ in range(2)] + [ScriptedCrew([ended(0, outcome=DONE)])]
    for crew in crews:
        crew.node = "badbadbad"

    def hire(excluded: Any) -> ScriptedCrew:
        asked.append(list(excluded))
        return crews[len(asked) - 1]

    said: list[str] = []
    run_training(
        {},
        where="x.yaml",
        run_url=str(tmp_path),
        hire=hire,
        stop=StopRequest(),
        on_line=lambda rank, line: said.append(line),
    )
    assert asked == [[], [], ["badbadbad"]]
    assert any("isn't used any more" in line for line in said)


def test_a_run_that_was_going_waits_for_resources_and_a_new_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.attempts.RESOURCE_POLL_S", 0.0)
    shortage = ResourceError("3 nodes are wanted", where="Ray cluster", fix="add nodes")
    answers: list[Any] = [ScriptedCrew([ended(-9)]), shortage, shortage, ScriptedCrew([ended(0, outcome=DONE)])]

    def hire(excluded: Any) -> ScriptedCrew:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        crew: ScriptedCrew = answer
        return crew

    said: list[str] = []
    settings: dict[str, Any] = {"where": "x", "run_url": str(tmp_path), "hire": hire, "stop": StopRequest()}
    result = run_training({}, **settings, on_line=lambda rank, line: said.append(line))
    assert (result.status, result.attempts) == ("done", 2)
    assert sum("waiting up to 10 min for resources: 3 nodes are wanted" in line for line in said) == 1
    answers.append(shortage)
    with pytest.raises(ResourceError):
        run_training({}, **settings, on_line=lambda rank, line: None)


def four(*cores: float) -> list[NodeFacts]:
    return [NodeFacts(f"node{i}", {"CPU": c}, f"10.0.0.{i}") for i, c in enumerate(cores)]


def test_an_elastic_job_takes_the_largest_world_that_divides_the_batch() -> None:
    wanted = Elastic(1, 8, global_batch=12)
    assert fit(wanted, four(1, 1, 1)) == Layout(3, 1)
    assert fit(wanted, four(4, 1)) == Layout(1, 4)
    assert fit(wanted, four(5)) == Layout(1, 4), "5 doesn't divide 12"
    assert fit(wanted, four(2, 2, 2)) == Layout(3, 2)
    assert fit(wanted._replace(maximum=3), four(2, 2, 2)) == Layout(3, 1)
    assert fit(wanted._replace(cpus_per_worker=2), four(5, 3)) == Layout(1, 2, 2)
    assert fit(wanted, []) is None
    gpus = [NodeFacts("g", {"CPU": 64.0, "GPU": 4.0})]
    assert fit(wanted._replace(gpus_per_worker=1), gpus) == Layout(1, 4, 1, 1)


def test_what_an_elastic_job_lacks_is_named() -> None:
    with pytest.raises(ResourceError, match=r"at least 4 worker\(s\) with 1 core\(s\) are wanted, .* room for 2"):
        check_fits(Elastic(4, 8, global_batch=12), four(1, 1))
    with pytest.raises(ConfigError, match="no world of 5 to 5 workers divides the global batch of 12"):
        check_fits(Elastic(5, 5, global_batch=12), four(8))


@pytest.mark.parametrize(("text", "count"), [("4", 4), ("2:8", (2, 8)), ("3:3", (3, 3))])
def test_workers_are_a_number_or_a_range(text: str, count: object) -> None:
    assert parse_workers(text) == count


@pytest.mark.parametrize("text", ["", "0", "a", "4:2", "0:2", ":3", "3:", "1:2:3", "-1"])
def test_other_workers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="MIN:MAX"):
        parse_workers(text)


def test_nodes_are_excluded_by_id_or_address() -> None:
    nodes = four(1, 1, 1)
    assert [n.id for n in without(nodes, ["node0", "10.0.0.2"])] == ["node1"]
    assert without(nodes, [""]) == nodes
