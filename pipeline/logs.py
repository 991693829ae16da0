"""Log lines as a machine reads them: one JSON object a line, with what they are about.

`within` says what the process works on; every line that is written inside has it, so that lines of one run, stage or
rank are found together, whoever wrote them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

from pipeline.credentials import masked

Format = Literal["text", "json"]
VARIABLE = "IPS_LOG_FORMAT"
"""Environment variable with the format, for processes that no option reaches."""
RUN_VARIABLE = "IPS_RUN"
"""The same with the invocation's run, under which its workers log."""
FIELDS = ("run", "stage", "slide", "rank")
"""What a line may be about."""

Value = str | int
_context: dict[str, Value] = {}


def context() -> Mapping[str, Value]:
    """What this process works on now."""
    return dict(_context)


def about(**fields: Value | None) -> None:
    """From now on the process works on these, or on none (None); for what lasts as long as its command."""
    for name, value in fields.items():
        _context.pop(name, None)
        if value is not None:
            _context[name] = value


@contextmanager
def within(**fields: Value) -> Iterator[None]:
    """The same for the length of a block. Of the process, not of a thread: threads help with one thing at a time."""
    before = {name: _context.get(name) for name in fields}
    about(**fields)
    try:
        yield
    finally:
        about(**before)


class JsonLines(logging.Formatter):
    """time, level, event, and of `FIELDS` those that are known; a traceback as `trace`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message holds."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **_context,
            **{name: value for name in FIELDS if (value := getattr(record, name, None)) is not None},
            "event": masked(record.getMessage()),
        }
        if record.exc_info:
            fields["trace"] = masked(self.formatException(record.exc_info))
        return json.dumps(fields, ensure_ascii=False)


def chosen_format() -> Format:
    """What the environment asks for."""
    return "json" if os.environ.get(VARIABLE) == "json" else "text"


def log_as_json(**fields: Value) -> None:
    """In a process without the program's own logging, as Ray's workers: JSON lines to stderr, where they are wanted."""
    about(run=os.environ.get(RUN_VARIABLE), **fields)
    if chosen_format() != "json":
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("pipeline")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
