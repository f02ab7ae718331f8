"""How the operator logs: one line per record, JSON for collectors or plain for people."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["json", "plain"]
SELDOM_SECONDS = 10.0


class JsonFormatter(logging.Formatter):
    """One JSON object per line, in the field names that log collectors of clouds know."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "severity": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class PlainFormatter(logging.Formatter):
    """One line per record for people, but for the trace of a defect.

    Messages quote what users, their containers and webhooks wrote: none of it may look like a line of ours or
    steer a terminal.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the library's name)
        """The line."""
        line = super().formatMessage(record)
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class Seldom(logging.Filter):
    """Lets one error through in a while."""

    def __init__(self) -> None:
        super().__init__()
        self._last = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is told."""
        if record.levelno < logging.ERROR:
            return True
        due = time.monotonic() >= self._last + SELDOM_SECONDS
        self._last = time.monotonic() if due else self._last
        return due


def configure(log_format: LogFormat, level: str) -> None:
    """Sets up the process's logging, to stderr."""
    handler = logging.StreamHandler()
    plain = PlainFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else plain)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # kopf tells of each event it hands on, and that it handles no signals in a thread, as it should not.
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
    # Whoever loads the configuration tells what is wrong with it.
    logging.getLogger("kubernetes").setLevel(logging.ERROR)
    # With no API server each of nine watches complains of every try to connect.
    logging.getLogger("kopf._cogs.clients.watching").addFilter(Seldom())
