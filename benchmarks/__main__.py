"""`python -m benchmarks`: run the comparisons, print a table, write benchmarks/results/<name>.json."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, UnequalWork, save, table

# Each module's docstring opens with what it compares; `run(pairs)` returns its comparisons.
BENCHMARKS = {
    "startup": "benchmarks.startup",
    "decode": "benchmarks.decode",
    "flip": "benchmarks.flip",
    "prep": "benchmarks.prep",
    "loader": "benchmarks.loader",
    "order": "benchmarks.order",
    "checkpoint": "benchmarks.checkpoint",
    "mae": "benchmarks.mae",
    "sam": "benchmarks.sam",
    "vitdet": "benchmarks.vitdet",
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when all ran, 1 when a comparison was refused, 2 for a wrong name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the benchmarks and stop")
    parser.add_argument("--only", action="append", metavar="NAME", help="run this one (may be given again)")
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs per comparison (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    names = options.only or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    refused = False
    for name in names:
        module = importlib.import_module(BENCHMARKS[name])
        if options.list:
            print(f"{name:12} {(module.__doc__ or '').strip().splitlines()[0]}")
            continue
        try:
            comparisons = module.run(options.pairs)
        except UnequalWork as error:
            print(f"refused: {error}", file=sys.stderr)
            refused = True
            continue
        print(table(comparisons))
        for comparison in comparisons:
            print(f"written: {save(comparison, options.out)}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
