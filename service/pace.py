"""How long a queue takes, so that what would be answered too late is refused at once.

A queue that refuses only when it is full, in front of calls whose deadlines are shorter than the full queue takes, works on
nothing but calls that have expired, or do so just before their answer: at three times the capacity nothing gets done.
"""

from __future__ import annotations

import time

# Seconds over which the pace is measured at least, and for which it is believed once nothing waits.
_WINDOW, _BELIEVED = 0.1, 1.0


# Share of the time until its deadline that work may have to wait: the pace is a guess, and the answer has to travel, too.
SHARE = 0.8


class Pace:
    """Seconds per item, measured only while items wait: how fast a queue is that is not empty. Not thread-safe."""

    def __init__(self) -> None:
        self._each = 0.0
        self._measured = 0.0
        self._since: float | None = None  # when the queue began to be busy, or was measured last
        self._done = 0

    def took(self, done: int, waiting: int) -> None:
        """So many were worked off, and so many wait."""
        now = time.monotonic()
        if self._since is not None:
            self._done += done
            passed = now - self._since
            if passed >= _WINDOW and self._done:
                each = passed / self._done
                self._each = 0.5 * (self._each + each) if self._known(now) else each
                self._measured, self._since, self._done = now, now, 0
        if not waiting:
            self._since, self._measured = None, now
        elif self._since is None:
            self._since, self._done = now, 0

    def seconds(self, items: int, together: int) -> float:
        """How long so many take, as far as is known; 0 where it is not. `together`: the most that become ready at one time,
        which is when the last of them is."""
        return (items + min(items, together)) * self._each if self._known(time.monotonic()) else 0.0

    def _known(self, now: float) -> bool:
        return bool(self._each) and (self._since is not None or now - self._measured < _BELIEVED)
