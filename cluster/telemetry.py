"""Logs as JSON lines, and the redaction of everything that is logged or told to a client."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime

MAX_CHARS = 2000
"""Longest text that `redact` returns."""

_WINDOW = 4 * MAX_CHARS
"""What `redact` looks at: it bounds the time that a hostile text can cost."""

_SECRETS = [
    # URLs: user and password, then the query, where presigned URLs carry their signature.
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/?#]*@", re.IGNORECASE), r"\1***@"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://[^\s?#\"'<>]*)[?#][^\s\"'<>]*", re.IGNORECASE), r"\1?***"),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), r"\1 ***"),
    # Hugging Face tokens, AWS key ids.
    (re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{10,}"), r"\1_***"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{12,}\b"), r"\1***"),
    # name=value and "name": "value", where the name says that the value is secret.
    (
        re.compile(
            r"((?:secret|token|password|passwd|credential|signature|api[_-]?key|access[_-]?key)[\w-]{0,30}"
            r"[\"']?\s{0,3}[=:]\s{0,3}[\"']?)[^\s\"',;&})\]]{6,}",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def redact(text: str) -> str:
    """Return `text` fit for logs, error texts and the store: one printable line of at most `MAX_CHARS`.

    Passwords and queries of URLs, tokens and keys become `***`; what is not printable, line ends included, is
    escaped, so that no text can forge a log line or reach a terminal as a control sequence.
    """
    if len(text) > _WINDOW:
        head = text[:_WINDOW]
        # The last word may be half of a secret.
        text = f"{head.rpartition(' ')[0] or head} …"
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return line if len(line) <= MAX_CHARS else f"{line[: MAX_CHARS - 1]}…"


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, `extra` fields, and the traceback by lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one redacted line."""
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        line |= {key: redact(str(value)) for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["traceback"] = [redact(text) for text in self.formatException(record.exc_info).splitlines()]
        return json.dumps(line)


def configure_logging(level: str = "INFO") -> None:
    """Log this process as JSON lines on standard error, from `level` on; replaces what was set up before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # Every process checks the schema; few change it.
