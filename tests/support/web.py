"""A real HTTP server on a loopback port. Each test defines its pages, including ones that misbehave."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Page = Callable[[BaseHTTPRequestHandler], object]


@dataclass
class Site:
    """Pages by path (without query), the requests received (method, path with query, headers), and the posted
    bodies."""

    host: str = ""
    pages: dict[str, Page] = field(default_factory=dict)
    requests: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)
    posted: list[bytes] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def file(self, path: str, body: bytes, **headers: str) -> str:
        """Serve `body` with an ETag, or 304 if the client sends that ETag; return its URL."""
        etag = f'"{hashlib.md5(body).hexdigest()}"'

        def page(request: BaseHTTPRequestHandler) -> None:
            if request.headers.get("If-None-Match") == etag:
                answer(request, 304)
            else:
                answer(request, 200, body, ETag=etag, **headers)

        self.pages[path] = page
        return self.url(path)

    def count(self, path: str) -> int:
        """Return the number of requests received for a path."""
        return sum(target.partition("?")[0] == path for _, target, _ in self.requests)


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    """Send a complete response; underscores in header names become dashes."""
    request.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def redirect(location: str, status: int = 302) -> Page:
    """Return a page that redirects to `location`."""
    return lambda request: answer(request, status, Location=location)


@contextmanager
def serving_site(tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    """Run a site until the block ends."""
    site = Site()
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.requests.append((self.command, self.path, dict(self.headers)))
            page = site.pages.get(self.path.partition("?")[0])
            self.close_connection = True
            try:
                if page is None:
                    answer(self, 404)
                else:
                    page(self)
            except OSError:
                pass  # The client has gone.

        do_HEAD = do_GET

        def do_POST(self) -> None:
            site.posted.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None: ...

        def pause(self, seconds: float) -> None:
            """Wait for some seconds, or until the site closes."""
            if closing.wait(seconds):
                raise ConnectionAbortedError

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None: ...

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    site.host = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield site
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
