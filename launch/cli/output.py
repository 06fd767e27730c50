"""What verbs say: results on stdout, everything on the way on stderr, one JSON object last where it is asked for."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.errors import UserError

if TYPE_CHECKING:
    from launch.chain.records import ChainStepResult


class VerbReply(Exception):  # noqa: N818 -- ends a verb, with or without success
    """A verb's result: what to print, and the exit code."""

    def __init__(self, document: dict[str, Any], lines: list[str], code: int = 0) -> None:
        super().__init__()
        self.document = document
        self.lines = lines
        self.code = code


def reply(document: dict[str, Any], lines: list[str], as_json: bool, *, code: int = 0) -> NoReturn:
    raise VerbReply(document, lines, code)


def reply_of_chain(
    results: dict[str, ChainStepResult], lines: list[str], as_json: bool, extra: dict[str, Any] | None = None
) -> NoReturn:
    from launch.chain.records import exit_code, results_document

    for result in results.values():
        if result.state == "failed":
            say(f"{result.name}: {result.error}")
    reply({**(extra or {}), "steps": results_document(results)}, lines, as_json, code=exit_code(results))


def print_reply(reply: VerbReply, as_json: bool) -> int:
    if as_json:
        print(json.dumps({**reply.document, "exit_code": reply.code}, default=str))
    else:
        for line in reply.lines:
            print(line)
    return reply.code


def print_error(error: UserError, as_json: bool) -> int:
    from launch.workers.attempts import error_document

    say(str(error))
    if as_json:
        print(json.dumps({"error": error_document(error), "exit_code": error.exit_code}))
    return error.exit_code


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
