"""The server's log: one line for each event, as text or JSON. Requests carry their id."""

import json
import logging
import sys
import time
from typing import Any, Literal

LogFormat = Literal["text", "json"]
LOG = logging.getLogger("srdeploy.serve")


class _TextFormatter(logging.Formatter):
    """Lines for people: 12:00:01 message key=value ..."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        pairs = "".join(f" {key}={_shown(value)}" for key, value in fields.items())
        return f"{moment} {level}{_one_line(record)}{pairs}" + _traceback(self, record)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, with time (UTC), level, message and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": _one_line(record),
            **getattr(record, "fields", {}),
        }
        if trace := _traceback(self, record):
            values["traceback"] = trace.strip()
        return json.dumps(values, default=str)


def start_log(format: LogFormat, quiet: bool = False) -> None:
    """Sends the server's events to stderr, and uvicorn's warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    LOG.handlers = [handler]
    LOG.propagate = False
    LOG.setLevel(logging.WARNING if quiet else logging.INFO)
    uvicorn = logging.getLogger("uvicorn")
    uvicorn.handlers = [handler]
    uvicorn.propagate = False
    uvicorn.setLevel(logging.WARNING)


def log(message: str, **fields: Any) -> None:
    """Logs one event."""
    LOG.info(message, extra={"fields": fields})


def log_exception(message: str, error: BaseException, **fields: Any) -> None:
    """Logs an unexpected error, a bug of ours, with its traceback."""
    LOG.error(message, extra={"fields": fields}, exc_info=error)


def _shown(value: Any) -> str:
    """The value as text, quoted if a client put line ends or the like into it."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def _one_line(record: logging.LogRecord) -> str:
    return " ".join(record.getMessage().split())


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return "\n" + formatter.formatException(record.exc_info) if record.exc_info else ""
