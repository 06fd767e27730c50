"""The examples in the docstrings of `vitrail`, run in a folder of small real data. This file needs none of the others,
so that it can be run against the installed package alone.
"""

from __future__ import annotations

import doctest
import sys

ORDER = ("train", "read_dataset", "load", "predict", "embed", "evaluate", "convert")  # the first makes the run


def run_examples() -> list[str]:
    """Run each function's example in the working directory, which has data, a configuration and a photo.

    Returns:
        What failed, and functions without an example.
    """
    import vitrail

    failures: list[str] = []
    for name in ORDER:
        function = getattr(vitrail, name)
        test = doctest.DocTestParser().get_doctest(function.__doc__ or "", {"vitrail": vitrail}, name, None, 0)
        if not test.examples:
            failures.append(f"{name} has no example")
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(test, out=failures.append)
    return failures


if __name__ == "__main__":
    failed = run_examples()
    sys.stdout.write("\n".join(failed))
    sys.exit(1 if failed else 0)
