"""Logs of head, stages and drafter: lines for people on stderr, lines of JSON in a file.

``PIPESIM_LOG`` names the lowest level that is logged: debug (every run and draft), info (sessions, loading, links),
warning (losses; the default) or error. With ``PIPESIM_LOG_FILE``, what is logged (from info on, by default) goes to
that file, and stderr keeps the warnings. Processes on one machine append to one file: a line is one write. The
variables are inherited by the processes that a head starts; a server on another machine has its own.
"""

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

from pipesim.errors import BadInputError

LEVEL, FILE = "PIPESIM_LOG", "PIPESIM_LOG_FILE"
LEVELS = ("debug", "info", "warning", "error")
_node = "head"
_handlers: list[logging.Handler] = []


def name_node(name: str) -> None:
    """This process writes its lines as ``name`` from now on: head, stage 0, drafter."""
    global _node
    _node = name


def event(logger: logging.Logger, level: int, what: str, **fields: Any) -> None:
    """Logs that ``what`` happened; ``fields`` are plain values, ``session``, ``epoch`` and ``run`` among them."""
    if logger.isEnabledFor(level):
        logger.log(level, what, extra={"fields": fields})


def configure_logging() -> None:
    """Sets logging up as the environment asks for.

    Raises:
        BadInputError: there is no such level, or the file cannot be written.
    """
    file = os.environ.get(FILE)
    level = os.environ.get(LEVEL, "info" if file else "warning").lower()
    if level not in LEVELS:
        raise BadInputError(f"--log-level (or {LEVEL}) = {level}: use one of {', '.join(LEVELS)}")
    lines = logging.StreamHandler()
    lines.setFormatter(_Lines())
    handlers: list[logging.Handler] = [lines]
    if file:
        try:
            records = logging.FileHandler(file, encoding="utf-8")
        except OSError as problem:
            raise BadInputError(f"--log-file (or {FILE}) {file}: cannot be written ({problem.strerror})") from None
        records.setFormatter(_Json())
        records.setLevel(level.upper())
        lines.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
        handlers.append(records)
    root = logging.getLogger()
    for ours in _handlers:
        root.removeHandler(ours)
        ours.close()
    _handlers[:] = handlers
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("asyncio", "grpc"):  # theirs is not our news
        logging.getLogger(name).setLevel(logging.WARNING)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


class _Lines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(node)s %(levelname)s %(message)s%(after)s")

    def format(self, record: logging.LogRecord) -> str:
        record.node = _node
        record.after = "".join(f" {key}={value}" for key, value in _fields(record).items())
        return super().format(record)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "node": _node,
            "pid": record.process,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
