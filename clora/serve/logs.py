"""Log lines as JSON, one an event. They hold names and numbers: no pictures, prompts, keys or addresses of files."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

LOGGER = "clora.serve"
OWN = (
    "event",
    "request",
    "key",
    "method",
    "route",
    "status",
    "ms",
    "code",
    "job",
    "effects",
    "samples",
    "port",
    "count",
)


class JsonLines(logging.Formatter):
    """Time, level and message, with those of `OWN` that a record was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line["message"] = record.getMessage()
        line |= {name: getattr(record, name) for name in OWN if hasattr(record, name)}
        if record.exc_info and record.exc_info[1] is not None:
            # Where, and of what kind: an error's text may quote what a client sent.
            trace = record.exc_info[2]
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            line["error"] = type(record.exc_info[1]).__name__
            if trace is not None:
                line["at"] = f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}"
        return json.dumps(line, ensure_ascii=True)


def log_json(stream: TextIO = sys.stderr) -> None:
    """Send the log of this package, and the warnings of the server below it, to `stream` as JSON lines. What the parser
    says of each damaged body is dropped: who sends them would choose what the log holds, and how much."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name, level in (("clora", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.getLogger("python_multipart.multipart").disabled = True
