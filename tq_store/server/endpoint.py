"""The HTTP server on the metrics port."""

import logging
import socket
import sys
import threading
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import WSGIApplication

from tq_store.errors import ConfigError

logger = logging.getLogger(__name__)

_IDLE_S = 10.0


class MetricsEndpoint:
    """Serves an application over HTTP, on threads of its own until `close()`.

    Args:
        application: What answers; called from several threads at once.
        host: Address to listen on.
        port: 0 picks one.

    Raises:
        ConfigError: The port cannot be had.
    """

    def __init__(self, application: WSGIApplication, *, host: str, port: int) -> None:
        try:
            self._server = (_Server6 if ":" in host else _Server)((host, port), _QuietHandler)
        except OSError as error:
            raise ConfigError(f"cannot show metrics on {host}:{port}: {error.strerror}") from error
        self._server.set_app(application)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics port", daemon=True)
        self._thread.start()
        shown_host = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown_host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stop listening and wait for the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Log what failed; a client that stalls or goes away is no news."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logger.error("a request on the metrics port failed", exc_info=error)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = _IDLE_S  # of a socket on which nothing comes

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a log full of scrapes hides the rest."""
