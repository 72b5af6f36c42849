"""The server's log: sentences, or one JSON object per line, on standard error.

Through the standard library's `logging` (logger `likewise`), so that what other libraries warn of takes the same form. A
line about a call has: ts, level, event, request_id, method, code, duration_ms, and where they apply decode_ms, queue_ms,
infer_ms, search_queue_ms, search_ms (the longest of a picture or search), pictures, batch, client, trace_id. Metadata and
pictures are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any, Literal

from service.call import Call, current

LOG = logging.getLogger("likewise")
_LEVELS = {
    **dict.fromkeys(("INTERNAL", "UNKNOWN", "DATA_LOSS"), logging.ERROR),
    **dict.fromkeys(("UNAVAILABLE", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED"), logging.WARNING),
}


def set_up(form: Literal["text", "json"]) -> None:
    """From here on this process logs to standard error in that form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    LOG.setLevel(logging.INFO)
    logging.captureWarnings(True)


def log_call(call: Call, code: str) -> None:
    """One line about a call that is over."""
    LOG.log(
        _LEVELS.get(code, logging.INFO), "%s %s", call.method, code, extra={"event": "call", "fields": said(call, code)}
    )


def said(call: Call, code: str) -> dict[str, Any]:
    """What a line about a call says."""
    fields: dict[str, Any] = {
        "request_id": call.request_id, "method": call.method, "code": code,
        "duration_ms": _ms(time.monotonic() - call.started),
    }  # fmt: skip
    fields |= {f"{name}_ms": _ms(stage.longest) for name, stage in call.stages.items()}
    if "infer" in call.stages:
        fields |= {"pictures": call.stages["infer"].count, "batch": call.batch}
    if call.client:
        fields["client"] = call.client
    if call.span is not None:
        fields["trace_id"] = call.span.trace_id
    return fields


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
        }
        call = current()
        if line["event"] != "call":
            line["message"] = record.getMessage()
            if record.name != LOG.name:
                line["logger"] = record.name
            if call is not None:
                line |= {"request_id": call.request_id, "method": call.method}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """A sentence; what went wrong begins as the refusals of the other commands do."""
        text = record.getMessage()
        if getattr(record, "event", "") == "call":
            fields = {
                name: value for name, value in record.__dict__["fields"].items() if name not in ("method", "code")
            }
            text += "".join(f" {name}={value}" for name, value in fields.items())
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text if record.levelno < logging.WARNING else f"likewise: {text}"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
