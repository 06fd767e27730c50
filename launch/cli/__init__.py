"""The command line: `vitrail VERB`.

Nothing heavy is imported here but inside the verb that needs it, so that `--help` answers at once. Results go to
stdout, everything said on the way to stderr; with `--json` the last line of stdout is one JSON object. Exit codes: 0
done, 2 the user's input is wrong, 75 stopped but resumable, 1 anything else.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn

import typer

from launch.cli import data, inspecting, training, weights
from launch.cli.output import VerbReply, print_error, print_reply, say
from pipeline.errors import Stopped, UserError

app = typer.Typer(
    name="vitrail",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From raw image-text pairs in object storage to pretrained and fine-tuned vision transformers.",
    epilog="Exit codes: 0 done, 2 wrong input, 75 stopped but resumable by the same command, 1 anything else.",
)

VERBS: dict[str, Callable[..., None]] = {
    "demo": training.demo,
    "run": training.run,
    "prep": data.prep,
    "index": data.index,
    "train": training.train,
    "verify": data.verify,
    "plan": training.plan,
    "doctor": inspecting.doctor,
    "show": inspecting.show,
    "runs": inspecting.runs,
    "predict": weights.predict,
    "eval": weights.evaluate,
    "convert": weights.convert,
    "export": weights.export,
    "report": inspecting.report,
}
for name, verb in VERBS.items():
    app.command(name)(verb)


def main() -> NoReturn:
    """Entry point: run a verb, print its reply or its one error message, exit."""
    as_json = "--json" in sys.argv[1:]
    os.environ["VITRAIL_COMMAND"] = shlex.join(["vitrail", *sys.argv[1:]])  # for pipeline.run_dir, in the workers
    try:
        app(prog_name="vitrail")  # exits by itself after --help (0) or a wrong option (2)
        code = 0
    except VerbReply as reply:
        code = print_reply(reply, as_json)
    except UserError as error:
        code = print_error(error, as_json)
    except Stopped as stopped:
        say(f"stopped: {stopped}")
        code = stopped.exit_code
    except ModuleNotFoundError as error:
        from launch.extras import missing_library

        missing = missing_library(error)
        if missing is None:
            raise
        code = print_error(missing, as_json)
    sys.stdout.flush()
    sys.exit(code)
