"""The comparison harness: right statistics, strict turns, no comparison of unequal work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.harness import Comparison, Contender, Goal, UnequalWork, Work, compare, describe, save, table


def equal(ours: object, peer: object) -> bool:
    return ours == peer


class FakeClock:
    """Time that moves only when a side says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Contender:
        left = list(seconds)

        def run() -> str:
            self.now += left.pop(0)
            return "done"

        return Contender(f"takes {seconds}", run)


def known_comparison(**more: object) -> Comparison:
    clock = FakeClock()
    return compare(
        "known",
        "a known series",
        clock.taking(9, 1, 2, 4),
        clock.taking(9, 4, 4, 4),
        check=equal,
        pairs=3,
        warmup=1,
        work=Work(8, "images"),
        timer=clock,
        **more,  # type: ignore[arg-type]
    )


def test_statistics_of_a_known_series() -> None:
    assert describe([4.0, 1.0, 2.0]) == (2.0, 1.0, 4.0, 1.5)
    assert describe([1.0, 2.0, 3.0, 10.0]) == (2.5, 1.0, 10.0, 3.6)


def test_ratios_are_taken_pair_by_pair_and_warm_up_is_left_out() -> None:
    known = known_comparison()
    assert known.ours_s == (1, 2, 4)
    assert known.peer_s == (4, 4, 4)
    assert known.ratios == (4, 2, 1)
    document = known.document()
    assert document["ratio"] == {"pairs": [4, 2, 1], "median": 2, "min": 1, "max": 4, "spread": 1.5}
    assert document["ours"]["median_s"] == 2
    assert document["ours"]["images_per_s"] == 4
    assert document["peer"]["images_per_s"] == 2


def test_sides_run_in_turn() -> None:
    turns: list[str] = []
    compare(
        "turns",
        "",
        Contender("a", lambda: turns.append("a")),
        Contender("b", lambda: turns.append("b")),
        check=equal,
        pairs=2,
        warmup=1,
    )
    assert turns == ["a", "b"] * 3


@pytest.mark.parametrize("answer", [False, None, 1])
def test_a_check_that_does_not_say_true_refuses(answer: object) -> None:
    with pytest.raises(UnequalWork, match="equal work"):
        compare("c", "", Contender("a", lambda: 1), Contender("b", lambda: 1), check=lambda a, b: answer)  # type: ignore[arg-type, return-value]


def test_unequal_outputs_late_in_the_run_refuse_too() -> None:
    outputs = iter([1, 1, 1, 2])
    with pytest.raises(UnequalWork):
        compare("c", "", Contender("a", lambda: 1), Contender("b", lambda: next(outputs)), check=equal, pairs=3)


def test_commands_are_compared_by_their_output() -> None:
    def python(code: str) -> Contender:
        return Contender(code, (sys.executable, "-S", "-c", code))

    same = compare(
        "commands", "", python("print(1 + 1)"), python("print(2)"), check=equal, pairs=1, warmup=0, clock="cpu"
    )
    assert len(same.ratios) == 1
    assert min(same.ours_s + same.peer_s) > 0
    with pytest.raises(UnequalWork, match="failed with 3: broken"):
        compare("c", "", python("import sys; sys.stderr.write('broken'); sys.exit(3)"), python(""), check=equal)


def test_no_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        compare("c", "", Contender("a", int), Contender("b", int), check=equal, pairs=0)


@pytest.mark.parametrize(
    ("goal", "met", "words"),
    [
        (Goal(), None, "none"),
        (Goal(ratio_min=2.0), True, "≥2x: met"),
        (Goal(ratio_min=2.5), False, "≥2.5x: NOT met"),
        (Goal(ours_max_s=2.0), True, "≤2 s: met"),
        (Goal(ratio_min=1.0, ours_max_s=1.9), False, "≥1x and ≤1.9 s: NOT met"),
    ],
)
def test_goals_are_judged_by_medians(goal: Goal, met: bool | None, words: str) -> None:
    known = known_comparison(goal=goal)
    assert known.goal_met is met
    assert words in table([known])


def test_the_result_file_tells_how_to_judge_and_repeat(tmp_path: Path) -> None:
    path = save(known_comparison(notes={"photos": 100}), tmp_path / "results")
    document = json.loads(path.read_text())
    assert path.name == "known.json"
    assert [p.name for p in path.parent.iterdir()] == ["known.json"]
    assert document["machine"]["usable_cores"] >= 1
    assert document["machine"]["memory_bytes"] > 2**20
    assert document["versions"]["python"] == sys.version.split()[0]
    assert {"date", "command", "git", "clock", "warmup", "pairs", "goal"} <= document.keys()
    assert document["notes"] == {"photos": 100}


def test_the_table_shows_both_sides() -> None:
    lines = table([known_comparison()]).splitlines()
    assert lines[0].split() == ["benchmark", "side", "median", "min", "max", "rate", "ratio", "goal"]
    assert "4 images/s" in lines[2]
    assert "2.00x (1.00-4.00)" in lines[2]
    assert "2 images/s" in lines[3]


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--only", "decod"])
    assert stop.value.code == 2
    assert "no benchmark decod; there are startup, decode" in capsys.readouterr().err


def test_every_benchmark_says_in_a_line_what_it_compares(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(command.BENCHMARKS)
    assert all(len(line.split()) > 4 for line in lines)
