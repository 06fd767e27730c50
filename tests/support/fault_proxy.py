"""A TCP/HTTP proxy before a real server that injects faults by rate and seed, as networks and busy stores do.

    with S3Server(folder) as server, FaultProxy(server.endpoint, [Fault("busy", 0.05), Fault("reset", 0.05)]) as proxy:
        environment = {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}

Requests go through as they are (the Host header too, so S3 signatures hold). Whether a fault strikes is a function of
the seed, the rule, the request's method and target, and how often that request came before: a retry may pass where
the first try didn't, and threads' timing changes nothing. `injected` counts what was done, by kind.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

Kind = Literal["busy", "reset", "truncate", "delay", "lost_reply"]
_PIECE_BYTES = 64 * 1024
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection", "te", "upgrade"}
_BUSY = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class Fault(NamedTuple):
    """A rule: which share of which requests meets what.

    Kinds: `busy` answers 503 SlowDown and the server never sees the request; `reset` breaks the connection in the
    middle of the body (of the request where it has one, which then never reaches the server; else of the reply);
    `truncate` ends the reply's body early and closes in an orderly way; `delay` waits `seconds` first; `lost_reply`
    lets the server do what was asked and breaks the connection instead of telling.
    """

    kind: Kind
    rate: float
    methods: str = "GET|HEAD|PUT|POST|DELETE"
    target: str = ""  # a regular expression that the path with its query must contain
    seconds: float = 1.0


class FaultProxy:
    """Listens on a free loopback port from `start()` (or entering a `with` block) to `stop()`, in threads of this
    process; clients may be other processes.

    Args:
        upstream: base URL of the server, "http://127.0.0.1:41211".
        faults: the rules; the first that strikes decides, but delays add up. May be replaced while it runs.
        seed: of what strikes whom.
    """

    def __init__(self, upstream: str, faults: Sequence[Fault] = (), *, seed: int = 0) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.faults = tuple(faults)
        self.seed = seed
        self.injected: Counter[str] = Counter()
        self.requests: Counter[tuple[str, str]] = Counter()  # (method, target)
        self._lock = threading.Lock()
        self._server: _Server | None = None

    @property
    def endpoint(self) -> str:
        """Base URL of the proxy."""
        assert self._server is not None, "the proxy isn't started"
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def start(self) -> FaultProxy:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        threading.Thread(target=self._server.serve_forever, name="fault-proxy", daemon=True).start()
        return self

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> FaultProxy:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def strikes(self, method: str, target: str) -> list[Fault]:
        """Count a request and say what it meets: delays, then at most one other fault."""
        with self._lock:
            before = self.requests[method, target]
            self.requests[method, target] += 1
        met: list[Fault] = []
        for number, fault in enumerate(self.faults):
            if not re.fullmatch(fault.methods, method) or not re.search(fault.target, target):
                continue
            if _draw(f"{self.seed} {number} {method} {target} {before}") < fault.rate:
                met.append(fault)
                if fault.kind != "delay":
                    break
        with self._lock:
            self.injected.update(fault.kind for fault in met)
        return met


class _Server(ThreadingHTTPServer):
    proxy: FaultProxy
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _relay(self) -> None:
        proxy = self.server.proxy
        if self._early is None:
            self._early = proxy.strikes(self.command, self.path)
        faults, self._early = self._early, None
        for fault in faults:
            if fault.kind == "delay":
                time.sleep(fault.seconds)
        kind = next((fault.kind for fault in faults if fault.kind != "delay"), None)
        size = int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in (self.headers.get("Transfer-Encoding") or "").lower()
        if kind == "reset" and (size or chunked):
            self.rfile.read(size // 2)
            self._break()
            return
        body = self._read_chunks() if chunked else self.rfile.read(size)
        if kind == "busy":
            self._answer_busy()
            return
        self._pass_on(body, kind)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay  # noqa: N815 -- names the base class looks for
    _early: list[Fault] | None = None

    def handle_expect_100(self) -> bool:
        """A client that asks before it sends its body is told 503 without having sent it."""
        self._early = self.server.proxy.strikes(self.command, self.path)
        if any(fault.kind == "busy" for fault in self._early):
            self._early = None
            self._answer_busy()
            return False
        return super().handle_expect_100()

    def _pass_on(self, body: bytes, kind: Kind | None) -> None:
        upstream = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=120)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                    upstream.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body or None)
            with upstream.getresponse() as reply:
                if kind == "lost_reply":
                    reply.read()
                    self._break()
                else:
                    self._send_reply(reply, kind)
        except OSError:
            self._break()
        finally:
            upstream.close()

    def _send_reply(self, reply: http.client.HTTPResponse, kind: Kind | None) -> None:
        known = reply.headers.get("Content-Length")
        data = None if known is not None else reply.read()  # a body of unknown length gets one
        size = int(known) if known is not None else len(data or b"")
        self.send_response_only(reply.status, reply.reason)
        for name, value in reply.headers.items():
            if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command == "HEAD":
            if kind in ("reset", "truncate"):
                self._break()
            return
        stop = size // 2 if kind in ("reset", "truncate") else size
        sent = 0
        while sent < stop:
            piece = data[sent:stop] if data is not None else reply.read(min(_PIECE_BYTES, stop - sent))
            if not piece:
                break
            self.wfile.write(piece)
            sent += len(piece)
        if kind == "reset":
            self._break()
        elif kind == "truncate":
            self.close_connection = True

    def _answer_busy(self) -> None:
        self.send_response_only(503, "Slow Down")
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(_BUSY)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(_BUSY)
        self.close_connection = True

    def _break(self) -> None:
        """End the connection with RST instead of FIN."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # The handler's own files hold the socket open otherwise; shutdown would send FIN first.
            self.rfile.close()
            self.connection.close()

    def _read_chunks(self) -> bytes:
        pieces = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: `injected` and `requests` tell."""


def _draw(text: str) -> float:
    """A number in [0, 1) by hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56
