"""Log records as JSON, one object a line, for machines that collect logs."""

import json
import logging
from datetime import UTC, datetime

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Keys ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``; ``exception`` with its traceback.

    What a call to the logger gives as ``extra`` becomes keys of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line without its end."""
        shown: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            shown["exception"] = self.formatException(record.exc_info)
        shown |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        return json.dumps(shown, default=str)
