"""Reading a file that holds a secret: bounded, and refused where everybody could read it."""

import stat
from pathlib import Path

from tq_store.errors import ConfigError


def read_secret_file(path: Path, name: str, max_bytes: int) -> bytes:
    """The contents of the file, with one byte more than `max_bytes` where it is too long.

    Args:
        path: The file.
        name: What messages call it, e.g. ``"token_file"``.
        max_bytes: The longest it may be.

    Raises:
        ConfigError: Not readable, or readable by everybody. The message never shows the contents.
    """
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(path.stat().st_mode) & stat.S_IROTH:
                raise ConfigError(f"{name} {path} can be read by everybody; run `chmod 600 {path}`")
            return file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{name} {path} cannot be read: {error.strerror}") from error
