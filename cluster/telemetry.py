"""Logs as JSON lines, and redacts everything that is logged or sent to a client."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime

MAX_CHARS = 2000
"""Maximum length of the text that `redact` returns."""

_WINDOW = 4 * MAX_CHARS
"""`redact` reads only this much of a text, so that a hostile one cannot take long."""

_SECRETS = [
    # URLs: user and password, then the query, which holds the signature of a presigned URL.
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/?#]*@", re.IGNORECASE), r"\1***@"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://[^\s?#\"'<>]*)[?#][^\s\"'<>]*", re.IGNORECASE), r"\1?***"),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), r"\1 ***"),
    # Hugging Face tokens, AWS key ids.
    (re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{10,}"), r"\1_***"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{12,}\b"), r"\1***"),
    # name=value and "name": "value", if the name suggests a secret.
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
    """Make `text` safe for logs, error messages and the store: one printable line of at most `MAX_CHARS`.

    Replaces tokens, keys, and the passwords and queries of URLs with `***`. Escapes unprintable characters
    and line ends, so that no text can forge a log line or send control sequences to a terminal.
    """
    if len(text) > _WINDOW:
        head = text[:_WINDOW]
        # Drop the last word: it may be half of a secret.
        text = f"{head.rpartition(' ')[0] or head} …"
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return line if len(line) <= MAX_CHARS else f"{line[: MAX_CHARS - 1]}…"


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON: time, level, logger, message, `extra` fields, traceback lines."""

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
    """Log JSON lines of `level` and above to standard error. Replaces any earlier logging configuration."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # Every process checks the schema, few change it.
