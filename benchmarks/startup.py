"""Start-up of the command: `vitrail --help` against half a second, beside Python importing only typer and rich.

The peer is the least that any command with this interface costs on the machine, so the ratio tells how much of the
time is ours, and stays comparable between machines.
"""

from __future__ import annotations

import sys

from benchmarks.harness import Comparison, Contender, Goal, UnequalWork, compare

HELP = (sys.executable, "-c", "import sys; sys.argv = ['vitrail', '--help']; from launch.cli import main; main()")
BARE = (sys.executable, "-c", "import typer, rich.console, rich.table; print('usage')")


def run(pairs: int) -> list[Comparison]:
    """One comparison, `startup`."""
    return [
        compare(
            "startup",
            "vitrail --help in a new process; peer: a new process that imports typer and rich",
            Contender("vitrail --help", HELP),
            Contender("python: import typer, rich", BARE),
            check=both_spoke,
            pairs=pairs,
            warmup=2,  # compiles and caches byte code
            goal=Goal(ours_max_s=0.5),
        )
    ]


def both_spoke(ours: bytes, peer: bytes) -> bool:
    """Ours printed the verbs, so it did all that `--help` has to do."""
    if b"train" not in ours or b"prep" not in ours:
        raise UnequalWork(f"vitrail --help printed no verbs: {ours[:200]!r}")
    return peer == b"usage\n"
