"""A follower: searches a collection that another process of this host writes to."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from export.bundle import RefusalError
from service.originals import Originals
from service.reading import Readable, StoredItem, read_manifest
from service.records import ClosedError, Reader

_ATTEMPTS = 20


class Follower(Readable):
    """A collection as its writer had committed it a moment ago; takes no lock. Thread-safe.

    It sees whole commits, each at once: a view pins the segments of its moment, whose files stay readable after the writer
    has merged and removed them. On a local disk alone: SQLite's log is shared in memory.
    """

    def __init__(self, folder: Path, space_id: str | None = None, every: float | None = 0.05) -> None:
        """Open, and look for commits `every` so many seconds (None: when `refresh` is called). Raises `RefusalError`."""
        self.folder = folder
        self.manifest = read_manifest(folder, space_id)
        self._opened_inode = self._inode()
        self.originals = Originals(folder)
        self._reader = Reader(folder / "records.sqlite")
        self._refreshing = threading.Lock()
        self._stop = threading.Event()
        self._seen = -1
        self.problem: str | None = None
        """Why the last look failed; None where it did not. The view before it stays."""
        self.looked = 0.0
        """When it last looked and saw everything, in seconds of `time.monotonic`."""
        try:
            self.refresh()
        except BaseException:
            self._reader.close()
            raise
        self._thread = None
        if every is not None:
            self._thread = threading.Thread(target=self._follow, args=(every,), name="follow", daemon=True)
            self._thread.start()

    def refresh(self) -> bool:
        """See what was committed up to now; whether that was anything. Raises `RefusalError` on damage."""
        with self._refreshing:
            now = time.monotonic()
            if self._inode() != self._opened_inode:
                raise RefusalError(f"{self.folder} was deleted, or made anew: open it again")
            version = self._reader.version()
            if version == self._seen:
                self.looked = now
                return False
            for attempt in range(_ATTEMPTS):
                known = {part.number: part.segment for part in self._view.parts} if self._seen >= 0 else {}
                try:
                    with self._reader.moment():
                        view = self._load(self._reader, known)
                        sequence = self._reader.counter("sequence")
                    break
                except (RefusalError, FileNotFoundError):
                    # A merge has removed a segment between its reading in the records and its opening.
                    if attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(0.005)
            self._view, self._sequence, self._seen, self.looked = view, sequence, version, now
            return True

    @property
    def is_there(self) -> bool:
        """Whether its folder still holds the collection that was opened."""
        return self._inode() == self._opened_inode

    def get(self, key: str) -> StoredItem:
        """A live item, as of its last commit. Raises `NotFoundError`."""
        for _ in range(_ATTEMPTS):
            found = self._committed(key)
            if found is not None:
                return found
            self.refresh()  # its segment is newer than the view
        raise RefusalError(f"the segments of {self.folder} change faster than they can be opened: try again")

    def close(self) -> None:
        """Stop following."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._reader.close()

    def _inode(self) -> tuple[int, int] | None:
        try:
            status = (self.folder / "records.sqlite").stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def look(self) -> None:
        """`refresh`, whose refusal becomes the `problem`."""
        try:
            self.refresh()
            self.problem = None
        except ClosedError:
            pass
        except Exception as e:  # whatever it is, the view before stays, and it looks again
            self.problem = f"{type(e).__name__}: {e}"

    def _follow(self, every: float) -> None:
        while not self._stop.wait(every):
            self.look()
