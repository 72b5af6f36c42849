"""Pictures that came as bytes, kept under the digest of these: originals/ab/<sha256> in a collection's folder.

A file is there, whole and durable, before the commit of the row that names it (records.sqlite: a row with a digest and
without a file of its own), and stays until a sweep finds that no live row names it. Equal bytes are kept once.
"""

from __future__ import annotations

import errno
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from export.bundle import sha256_file, sync_file, sync_folder
from service.errors import DataLossError, DiskFullError, NotFoundError

_LOST = "`likewise index verify --recover` lists the items that it was kept for; send their pictures again"


class MissingOriginalError(DataLossError):
    """A picture that is kept by the records is not there."""


class Swept(NamedTuple):
    """What a sweep removed."""

    files: int
    bytes: int


def digest_of(picture: bytes) -> str:
    """The name under which a picture is kept: SHA-256, hexadecimal."""
    return hashlib.sha256(picture).hexdigest()


def place_of(folder: Path, digest: str) -> Path:
    """Where a picture lies below an `originals` folder."""
    return folder / digest[:2] / digest


class Originals:
    """The kept pictures of one collection. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the collection; what is not there yet is made with the first picture."""
        self.folder = folder / "originals"
        self._name = folder.name
        self._changed = threading.Condition()
        self._pending: Counter[str] = Counter()  # digests that a commit is about to name
        self._durable: set[str] = set()  # subfolders whose names this process has synced
        self._users = 0
        self._closed = False

    @contextmanager
    def kept(self, pictures: Iterable[bytes]) -> Iterator[None]:
        """Write pictures durably. Commit the rows that name them inside: until then no sweep takes them away.

        Raises `NotFoundError` on a collection that was closed or deleted, `DiskFullError`.
        """
        by_digest = {digest_of(picture): picture for picture in pictures}
        with self._awaited(by_digest.keys()):
            self._write(by_digest.items())
            yield

    @contextmanager
    def carried_over(self, other: Originals, digests: Iterable[str]) -> Iterator[None]:
        """`kept`, of pictures of another collection. Raises `DataLossError` where one is missing or damaged there."""
        names = set(digests)
        with self._awaited(names):
            self._write((digest, other.read(digest)) for digest in sorted(names))
            yield

    def read(self, digest: str) -> bytes:
        """A picture. Raises `MissingOriginalError`, or `DataLossError` where it is damaged."""
        path = place_of(self.folder, digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise MissingOriginalError(f"{path} is missing: {_LOST}", "ORIGINAL_MISSING") from None
        if digest_of(data) != digest:
            raise DataLossError(
                f"{path} was damaged, its bytes have another digest than its name: {_LOST}", "ORIGINAL_CHECKSUM"
            )
        return data

    def is_sound(self, digest: str) -> bool:
        """Whether a picture is there and undamaged."""
        try:
            return sha256_file(place_of(self.folder, digest)) == digest
        except OSError:  # missing, or bad sectors
            return False

    def extent(self) -> Swept:
        """How many files there are, and how large they are together."""
        sizes = [path.stat().st_size for path in self.folder.glob("??/*")]
        return Swept(len(sizes), sum(sizes))

    def sweep(self, named: Callable[[str], Iterable[str]]) -> Swept:
        """Remove the pictures that no live row names, and what interrupted writes left. `named`: the digests, committed up
        to now, that begin with a prefix."""
        files = size = 0
        with self._used():
            for subfolder in sorted(self.folder.glob("??")):
                if self._closed:  # whoever closes waits; the next sweep does the rest
                    break
                known = set(named(subfolder.name))
                for path in subfolder.iterdir():
                    if path.name in known:
                        continue
                    with self._changed:
                        # Nothing becomes pending meanwhile; what was, and is no more, has been committed by now.
                        digest = path.name.removeprefix(".").partition(".")[0]
                        if self._pending[digest] or path.name in named(digest):
                            continue
                        try:
                            found = path.stat().st_size
                            path.unlink()
                        except FileNotFoundError:
                            continue
                    files, size = files + 1, size + found
        return Swept(files, size)

    def close(self) -> None:
        """Wait for what is being written or swept; nothing can be written any more."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._users)

    @contextmanager
    def _awaited(self, digests: Collection[str]) -> Iterator[None]:
        """Inside, no sweep takes these away."""
        with self._used():
            with self._changed:
                self._pending.update(digests)
            try:
                yield
            finally:
                with self._changed:
                    self._pending -= Counter(digests)

    @contextmanager
    def _used(self) -> Iterator[None]:
        with self._changed:
            if self._closed:
                raise NotFoundError(f"the collection {self._name!r} is closed or was deleted", "collection", self._name)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _write(self, pictures: Iterable[tuple[str, bytes]]) -> None:
        """Also of files that are there already the name is made durable: another thread may not have come so far."""
        subfolders = set()
        try:
            for digest, data in pictures:
                path = place_of(self.folder, digest)
                self._make(path.parent)
                subfolders.add(path.parent)
                if path.is_file() and path.stat().st_size == len(data):
                    continue
                temporary = path.with_name(f".{digest}.{threading.get_ident()}.tmp")
                try:
                    temporary.write_bytes(data)
                    sync_file(temporary)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
            for subfolder in subfolders:
                sync_folder(subfolder)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(
                    f"the disk of {self._name!r} is full; nothing of this write was stored: free space"
                ) from e
            raise

    def _make(self, subfolder: Path) -> None:
        """Durably."""
        with self._changed:
            if subfolder.name not in self._durable:
                self.folder.mkdir(exist_ok=True)
                subfolder.mkdir(exist_ok=True)
                sync_folder(self.folder)  # also where an earlier process has made it: it may not have come so far
                sync_folder(self.folder.parent)
                self._durable.add(subfolder.name)
