"""What the metrics port answers: metrics, the status page, status.json and health, each at its path."""

from collections.abc import Callable, Iterable
from importlib.resources import files
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from tq_store.server.status_page import render_page
from tq_store.status import Status

_SAFETY = [
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]
_HTML, _JSON, _TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
_STATIC = {"/status.css": "text/css; charset=utf-8", "/status.js": "text/javascript; charset=utf-8"}

Answer = tuple[str, str, bytes]


class Pages:
    """A WSGI application. It changes nothing: only GET and HEAD are answered, on few paths.

    Called from the HTTP server's threads.

    Args:
        metrics: Answers ``/metrics``.
        read_status: The server's status now.
        is_alive: Whether the server still works at all; ``/livez`` tells.
        is_serving: Whether it takes calls; ``/readyz`` tells.
    """

    def __init__(
        self,
        metrics: WSGIApplication,
        *,
        read_status: Callable[[], Status],
        is_alive: Callable[[], bool],
        is_serving: Callable[[], bool],
    ) -> None:
        self._metrics = metrics
        self._read_status = read_status
        self._is_alive = is_alive
        self._is_serving = is_serving
        self._static = {
            path: (kind, files(__package__).joinpath("static", path[1:]).read_bytes())
            for path, kind in _STATIC.items()
        }

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        if method in ("GET", "HEAD") and path == "/metrics":
            return self._metrics(environ, start_response)
        if method in ("GET", "HEAD"):
            status, kind, body = self._answer(path)
        else:
            status, kind, body = "405 Method Not Allowed", _TEXT, b"only GET and HEAD\n"
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), *_SAFETY]
        start_response(status, headers)
        return [] if method == "HEAD" else [body]

    def _answer(self, path: str) -> Answer:
        if path in self._static:
            return "200 OK", *self._static[path]
        routes: dict[str, Callable[[], Answer]] = {
            "/": self._page,
            "/status": self._page,
            "/status.json": self._json,
            "/livez": lambda: _health(self._is_alive(), "alive", "stuck"),
            "/readyz": lambda: _health(self._is_serving(), "ready", "starting or draining"),
        }
        return routes.get(path, _not_found)()

    def _page(self) -> Answer:
        return "200 OK", _HTML, render_page(self._read_status()).encode()

    def _json(self) -> Answer:
        return "200 OK", _JSON, self._read_status().to_json().encode()


def _health(is_well: bool, yes: str, no: str) -> Answer:
    if is_well:
        return "200 OK", _TEXT, f"{yes}\n".encode()
    return "503 Service Unavailable", _TEXT, f"{no}\n".encode()


def _not_found() -> Answer:
    return "404 Not Found", _TEXT, b"here are /, /metrics, /status.json, /livez and /readyz\n"
