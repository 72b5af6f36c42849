"""What changed in a folder since a collection last followed it: seen by size and time of change, decided by the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from export.bundle import sha256_file
from export.preprocess import PictureFile


class FileState(NamedTuple):
    """The file behind an item when it was embedded; all absent where it came from a client."""

    size: int | None
    """Bytes."""
    mtime_ns: int | None
    """Time of last change, in nanoseconds since 1970."""
    sha256: str | None
    """Of its bytes, hexadecimal; None for items of older versions."""


class Changes(NamedTuple):
    """What must be done so that a collection follows a folder."""

    embed: list[PictureFile]
    """New files, and those with other bytes."""
    touched: list[PictureFile]
    """The same bytes at another time."""
    moved: list[tuple[str, PictureFile]]
    """(old key, file): the bytes of an item whose own file is gone, under a new name."""
    gone: list[str]
    """Keys of items whose file is gone."""


def compare(before: Mapping[str, FileState], found: Sequence[PictureFile], unlisted: Sequence[str]) -> Changes:
    """`before`: state per key. `unlisted`: folders that could not be listed, so that nothing below them counts as gone.

    Only files whose size or time differ, and new ones as large as one that is gone, are read.
    """
    here = {picture.key for picture in found}
    hidden = tuple(f"{folder}/" for folder in unlisted)
    gone = {
        key: state
        for key, state in before.items()
        if state.size is not None and key not in here and not key.startswith(hidden)
    }
    sizes = {state.size for state in gone.values()}
    by_content: dict[str, list[str]] = {}
    for key, state in sorted(gone.items(), reverse=True):  # the first key is taken first
        if state.sha256 is not None:
            by_content.setdefault(state.sha256, []).append(key)
    embed, touched, moved = [], [], []
    for picture in found:
        old = before.get(picture.key)
        if old is not None and (old.size, old.mtime_ns) == (picture.size, picture.mtime_ns):
            continue
        if old is not None and old.sha256 is not None and old.size == picture.size and _digest(picture) == old.sha256:
            touched.append(picture)
        elif old is None and picture.size in sizes and (same := by_content.get(_digest(picture))):
            moved.append((same.pop(), picture))
        else:
            embed.append(picture)
    left = gone.keys() - {key for key, _ in moved}
    return Changes(embed, touched, moved, sorted(left))


def _digest(picture: PictureFile) -> str:
    try:
        return sha256_file(picture.path)
    except OSError:
        return ""  # embedding it will say why
