"""The shared secret that a client shows and a server demands: its file and its place on the wire."""

import stat
from pathlib import Path

from tq_store.errors import ConfigError

METADATA_KEY = "authorization"
MIN_TOKEN_CHARS = 16
_MAX_FILE_BYTES = 64 << 10


def load_tokens(path: Path) -> tuple[str, ...]:
    """The tokens in a file, one a line.

    A client shows the first, a server accepts each: so one is replaced without locking anybody out.

    Raises:
        ConfigError: Not readable, readable by everybody, or not tokens. The message never shows the contents.
    """
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(path.stat().st_mode) & stat.S_IROTH:
                raise ConfigError(f"token_file {path} can be read by everybody; run `chmod 600 {path}`")
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"token_file {path} cannot be read: {error.strerror}") from error
    tokens = tuple(line.strip() for line in content.decode("ascii", "replace").splitlines() if line.strip())
    if len(content) > _MAX_FILE_BYTES or not tokens or not all(_is_token(token) for token in tokens):
        raise ConfigError(
            f"token_file {path} must hold tokens of at least {MIN_TOKEN_CHARS} printable ASCII characters, "
            f"one a line; `openssl rand -hex 32` makes a good one"
        )
    return tokens


def bearer(token: str) -> str:
    """The metadata value that carries a token."""
    return f"Bearer {token}"


def _is_token(text: str) -> bool:
    return len(text) >= MIN_TOKEN_CHARS and all("!" <= character <= "~" for character in text)
