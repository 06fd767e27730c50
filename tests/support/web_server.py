"""A real HTTP server on loopback whose pages misbehave as web servers do: for tests of fetching."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class MisbehavingServer(ThreadingHTTPServer):
    """Serves `pages` (path -> body), and the paths below for what goes wrong."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, pages: dict[str, bytes] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages = pages or {}
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are expected."""


@contextlib.contextmanager
def serving(pages: dict[str, bytes] | None = None) -> Iterator[MisbehavingServer]:
    server = MisbehavingServer(pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: MisbehavingServer
    STATUS: ClassVar[dict[str, int]] = {"/gone": 410, "/forbidden": 403, "/broken": 500}

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.asked[self.path] += 1
            times = server.asked[self.path]
            server.agents.add(self.headers.get("User-Agent", ""))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self._answer(times)
        finally:
            with server.lock:
                server.at_once -= 1

    def _answer(self, times: int) -> None:  # noqa: C901 -- one line for each way of misbehaving
        path = self.path
        page = self.server.pages.get(path.removeprefix("/slow"))
        if path == "/endless":
            self._drip()
        elif path == "/silent":
            time.sleep(30)
        elif path.startswith("/twice") and times <= 2:
            self._send(503 if path.endswith("busy") else 500, b"")
        elif path.startswith("/twice"):
            self._send(200, b"at last")
        elif path == "/later":
            self._send(429, b"", {"Retry-After": "1"}) if times == 1 else self._send(200, b"now")
        elif path == "/much-later":
            self._send(429, b"", {"Retry-After": "3600"})
        elif path.startswith("/to/"):
            self._send(302, b"", {"Location": path.removeprefix("/to/")})
        elif path == "/loop":
            self._send(302, b"", {"Location": "/loop"})
        elif path.startswith("/robots/"):
            self._send(200, b"image", {"X-Robots-Tag": path.removeprefix("/robots/").replace("%20", " ")})
        elif path == "/huge-said":
            self._send(200, b"x" * 2000, {})
        elif path == "/huge-unsaid":
            self._send(200, b"x" * 100_000, chunked=True)
        elif path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * 10)
            self.close_connection = True
        elif path == "/gzip-bomb":
            import gzip

            self._send(200, gzip.compress(bytes(50_000_000)), {"Content-Encoding": "gzip"})
        elif path in self.STATUS:
            self._send(self.STATUS[path], b"")
        elif page is not None:
            if path.startswith("/slow"):
                time.sleep(0.05)
            self._send(200, page)
        else:
            self._send(404, b"<html>nothing here</html>")

    def _drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        for _ in range(600):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, chunked: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))))
        self.end_headers()
        if chunked:
            for start in range(0, len(body), 10_000):
                piece = body[start : start + 10_000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
