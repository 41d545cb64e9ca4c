"""The shared secret that a client shows and a server demands: its file and its place on the wire."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from tq_store.errors import ConfigError
from tq_store.secret_file import read_secret_file

METADATA_KEY = "authorization"
MIN_TOKEN_CHARS = 16
_MAX_FILE_BYTES = 64 << 10
_CHECK_S = 1.0

logger = logging.getLogger(__name__)


def load_tokens(path: Path) -> tuple[str, ...]:
    """The tokens in a file, one a line.

    A client shows the first, a server accepts each: so one is replaced without locking anybody out.

    Raises:
        ConfigError: Not readable, readable by everybody, or not tokens. The message never shows the contents.
    """
    content = read_secret_file(path, "token_file", _MAX_FILE_BYTES)
    tokens = tuple(line.strip() for line in content.decode("ascii", "replace").splitlines() if line.strip())
    if len(content) > _MAX_FILE_BYTES or not tokens or not all(_is_token(token) for token in tokens):
        raise ConfigError(
            f"token_file {path} must hold tokens of at least {MIN_TOKEN_CHARS} printable ASCII characters, "
            f"one a line; `openssl rand -hex 32` makes a good one"
        )
    return tokens


class TokenFile:
    """The token that a client shows: the first of its file, read again when the file changes.

    So an operator replaces a token without restarting engines. A file that cannot be used any more changes
    nothing. Safe to use from several threads.

    Args:
        path: The file.
        clock: Seconds, monotonic.

    Raises:
        ConfigError: It cannot be used.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked_s = clock()
        self._version = file_version(path)
        self._token = load_tokens(path)[0]

    def current(self) -> str:
        """The token; looks at the file at most once a second."""
        now_s = self._clock()
        if now_s - self._checked_s >= _CHECK_S:
            self._checked_s = now_s
            version = file_version(self._path)
            if version != self._version:
                self._version = version
                try:
                    self._token = load_tokens(self._path)[0]
                except ConfigError as error:
                    logger.warning("the token stays as it was: %s", error)
        return self._token


def file_version(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file, also where a symbolic link to it is moved; None while it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def bearer(token: str) -> str:
    """The metadata value that carries a token."""
    return f"Bearer {token}"


def _is_token(text: str) -> bool:
    return len(text) >= MIN_TOKEN_CHARS and all("!" <= character <= "~" for character in text)
