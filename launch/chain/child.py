"""Steps that run in a child process: starting it, and what the child does.

    python -m launch.chain.child < request.json

The request is a JSON object with `kind`, `document`, `where` and `output`; the answer is one JSON object, last on
stdout, with exit code 0, 75 when stopped, 2 (then it holds `error`) or 1.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any, NamedTuple

from launch.chain.kinds import step_kind
from launch.extras import missing_library
from launch.parent import watch_parent
from launch.stopping import StopRequest
from launch.workers.attempts import describe_exit, error_document, rebuild_error
from pipeline.config import Document
from pipeline.errors import Stopped, UserError

_TERMINATE_GRACE_S = 10.0

log = logging.getLogger("vitrail")


class ChildRequest(NamedTuple):
    """What a child is to run."""

    kind: str
    document: Document
    where: str
    output: str


class ChildEnding(NamedTuple):
    """How a child ended."""

    summary: dict[str, Any] = {}
    stopped: bool = False
    failure: str = ""  # how its process ended, when it neither finished nor said what is wrong


def run_child(request: ChildRequest, *, on_line: Callable[[str], None], stop: StopRequest) -> ChildEnding:
    """Run a step in a process of its own, which ends with this one.

    Args:
        on_line: gets each line of its log, line end included.

    Raises:
        UserError: the child's own.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "launch.chain.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is for the driver
        env={**os.environ, "VITRAIL_PARENT": str(os.getpid())},  # it ends with this thread, which waits for it
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    json.dump(request._asdict(), child.stdin)
    child.stdin.close()
    answer: list[str] = []
    readers = [
        threading.Thread(target=_pass_on, args=(child.stderr, on_line), daemon=True),
        threading.Thread(target=lambda out=child.stdout: answer.append(out.read()), daemon=True),
    ]
    for reader in readers:
        reader.start()
    while child.poll() is None:
        if stop.wait(0.1):
            _end(child)
    for reader in readers:
        reader.join(timeout=2)
    if stop.requested() and child.returncode != 0:
        return ChildEnding(stopped=True)
    reply = _last_json("".join(answer))
    if child.returncode == 0:
        return ChildEnding(reply)
    if "error" in reply:
        raise rebuild_error(reply["error"])
    return ChildEnding(failure=describe_exit(child.returncode))


def _pass_on(stream: IO[str], on_line: Callable[[str], None]) -> None:
    for line in stream:
        on_line(line)


def _end(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.wait(timeout=_TERMINATE_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _last_json(text: str) -> dict[str, Any]:
    """The JSON object on the last line that holds one; {} when none does."""
    for line in reversed(text.splitlines()):
        try:
            document = json.loads(line)
        except ValueError:
            continue
        if isinstance(document, dict):
            return document
    return {}


def main() -> int:
    """Read the request, run it, answer; returns the exit code."""
    parent = os.environ.get("VITRAIL_PARENT")
    if parent:
        watch_parent(int(parent))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("aiobotocore").setLevel(logging.WARNING)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    request = ChildRequest(**json.load(sys.stdin))
    try:
        summary = step_kind(request.kind).run(
            request.document, where=request.where, output=request.output, stop=StopRequest()
        )
    except Stopped as stopped:
        log.info("%s", stopped)
        return Stopped.exit_code
    except UserError as error:
        print(json.dumps({"error": error_document(error)}))
        return error.exit_code
    except ModuleNotFoundError as missing:
        refusal = missing_library(missing)
        if refusal is None:
            raise
        print(json.dumps({"error": error_document(refusal)}))
        return refusal.exit_code
    print(json.dumps(summary, default=str))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
