"""The Ray that everything runs on: one embedded in this process, or an existing one by address.

The embedded one listens on the loopback only, behind a token of its own that reaches children through the
environment, and ends with this process, kill -9 included. Environment variables (credentials among them) reach Ray's
processes by inheritance, so set them before `connect`.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
from typing import NamedTuple

from pipeline.errors import ResourceError
from pipeline.machine import Machine, available_cores

_CONNECT_TIMEOUT_S = 10.0
_OBJECT_STORE_BYTES = 256 << 20  # agents pass text; preparation passes URLs and counts
_reapers: list[subprocess.Popen[bytes]] = []
_REAPER = """
import os, signal, sys
sys.stdin.buffer.read()
for pid in sys.argv[1:]:
    try:
        os.kill(int(pid), signal.SIGKILL)
    except OSError:
        pass
"""


class Cluster(NamedTuple):
    """A connection to Ray."""

    address: str
    embedded: bool
    num_cpus: int
    num_gpus: int


def connect(address: str | None = None, *, num_cpus: int | None = None) -> Cluster:
    """Connect this process to Ray; a second call returns the same connection.

    Args:
        address: of an existing Ray ("host:6379", "auto", "ray://…" is not served); None: `RAY_ADDRESS`, else embedded.
        num_cpus: cores the embedded Ray hands out; None: what this machine grants us.

    Raises:
        ResourceError: nothing answers at the address, or Ray doesn't start.
    """
    wanted = address or os.environ.get("RAY_ADDRESS") or None
    _set_defaults(embedded=wanted is None)
    import ray

    if not ray.is_initialized():
        try:
            _join(wanted) if wanted else _embed(num_cpus or available_cores())
        except Exception as error:  # Ray raises many kinds, for what always is a matter of surroundings
            raise ResourceError(
                _first_line(error) or type(error).__name__,
                where=f"Ray at {wanted}" if wanted else "embedded Ray",
                fix="check the address (and RAY_AUTH_MODE with its token)" if wanted else "see the logs under /tmp/ray",
            ) from error
    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return Cluster(
        address=ray.get_runtime_context().gcs_address,
        embedded=wanted is None,
        num_cpus=int(total.get("CPU", 0)),
        num_gpus=int(total.get("GPU", 0)),
    )


def disconnect() -> None:
    """Leave Ray, ending an embedded one."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
    while _reapers:
        reaper = _reapers.pop()
        reaper.kill()  # Ray's processes have ended in order
        reaper.wait()


def machines() -> list[Machine]:
    """Every machine of the cluster that is alive, with all it has; Ray calls them nodes."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [Machine(n["NodeID"], n["Resources"], n["NodeManagerAddress"]) for n in nodes if n["Alive"]]


def free_machines() -> list[Machine]:
    """Every machine that is alive, with what isn't taken."""
    from ray._private import state  # the public call gives the sum over machines only

    free = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return [machine._replace(resources=dict(free.get(machine.id, {}))) for machine in machines()]


def draining() -> list[str]:
    """Ids of machines that are about to leave."""
    from ray._private import state

    return list(state.state.get_draining_nodes())


def _embed(num_cpus: int) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=True,
    )
    _take_helpers_along()


def _take_helpers_along() -> None:
    """Have Ray's helper processes end with this one.

    Its daemons do so by themselves, but the helpers that these start wait for more than a minute, trying to report the
    loss. A small process of ours, which reads a pipe that closes with us, ends them.
    """
    import psutil

    helpers = [child.pid for child in psutil.Process().children(recursive=True)]
    reaper = subprocess.Popen(
        [sys.executable, "-S", "-c", _REAPER, *map(str, helpers)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # not reached by the terminal's Ctrl-C
    )
    _reapers.append(reaper)  # keeps the pipe open


def _join(address: str) -> None:
    import ray

    host, _, port = address.rpartition(":")
    if host and port.isdigit():  # Ray itself would try for minutes
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True)


def _set_defaults(embedded: bool) -> None:
    """Variables that Ray reads when it is imported or started, where the user's surroundings don't set them."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do by default, else it warns
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_niceness": "0",  # 15 by default, which starves the ranks on a machine that does anything else
    }
    if embedded and "ray" not in sys.modules:  # Ray has read them by then
        defaults["RAY_AUTH_MODE"] = "token"
        defaults["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # Makes Ray take 127.0.0.1 for the node's address, on Linux as on the systems it is named after, so that
        # nothing listens on outer interfaces.
        defaults["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
