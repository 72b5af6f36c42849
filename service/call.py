"""One call while it runs: who asks, under which id, and where its time goes."""

from __future__ import annotations

import random
import re
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.security import Key
    from service.tracing import Span

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(slots=True)
class Stage:
    """What became of a stage in a call that may hold many pictures, in seconds."""

    longest: float = 0.0
    count: int = 0


@dataclass(eq=False, slots=True)
class Call:
    """An RPC. Stages are reported to it from the event loop only."""

    method: str
    """Service and method, such as likewise.v1.SearchService/Search."""
    request_id: str
    """As the caller gave it, or made here."""
    key: Key | None = None
    """Of whom it is, where keys are asked for."""
    client: str = ""
    """Whom fairness counts it for; '' for the connection."""
    span: Span | None = None
    """Its trace."""
    started: float = field(default_factory=time.monotonic)
    stages: dict[str, Stage] = field(default_factory=dict)
    batch: int = 0
    """Pictures of the largest batch that it was in."""

    def stage(self, name: str, start: float, end: float, **attributes: Any) -> None:
        """A stage took from `start` to `end`, in seconds of `time.monotonic`."""
        known = self.stages.get(name)
        if known is None:
            known = self.stages[name] = Stage()
        known.longest = max(known.longest, end - start)
        known.count += 1
        if self.span is not None:
            self.span.stage(name, start, end, attributes)

    def batched(self, size: int, start: float, end: float, batch: Any = None) -> None:
        """One of its pictures went through the encoder among `size`; `batch`: the batch's own span."""
        self.batch = max(self.batch, size)
        self.stage("infer", start, end, batch=size, **({} if batch is None else {"link": batch}))


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def current() -> Call | None:
    """The call that this task works for."""
    return _current.get()


def begin(call: Call) -> None:
    """From here on this task, and those that it starts, work for `call`."""
    _current.set(call)


def client_of(context: Any) -> str:
    """Whom fairness counts a call for: the name of its key or certificate, or else its connection."""
    call = _current.get()
    peer: str = (call.client if call is not None else "") or context.peer()
    return peer


def request_id(asked: str | None) -> str:
    """A request's id: as it was asked for where that is 1 to 128 of A-Z a-z 0-9 . _ : -, or a new one."""
    return asked if asked is not None and _ID.fullmatch(asked) else f"{random.getrandbits(64):016x}"
