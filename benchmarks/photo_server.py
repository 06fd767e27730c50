"""Photos over loopback HTTP, from memory: `python -m benchmarks.photo_server FOLDER` prints its address and serves."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    pages: dict[str, bytes]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/")
        body = self.server.pages.get(name)
        self.send_response(200 if body is not None else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("Content-Type", "image/jpeg")
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def main() -> None:
    """Serve every file of the folder until killed."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.pages = {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir() if path.is_file()}
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
