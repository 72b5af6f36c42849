"""What changed since a collection last followed its pictures: seen by size and time of change, decided by the bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from export.bundle import sha256_file
from export.preprocess import PictureFile, UnreadablePictureError
from export.sources.picture import Picture, SourcePicture
from service.records import MAX_KEY_BYTES, FileState


class Changes(NamedTuple):
    """What must be done so that a collection follows a folder, or holds what other sources name."""

    embed: list[Picture]
    """New pictures, and those with other bytes."""
    touched: list[Picture]
    """The same bytes at another time."""
    moved: list[tuple[str, Picture]]
    """(old key, picture): the bytes of an item whose own file is gone, under a new name; or the same name elsewhere."""
    gone: list[str]
    """Keys of items whose file is gone."""
    replaced: list[str]
    """Keys of items from files elsewhere that pictures found now, with other bytes, take over."""
    owned: list[str]
    """Keys of pictures whose item a client wrote: they are left alone."""


def compare(
    before: Mapping[str, FileState], found: Sequence[Picture], folder: Path | None, unread: Sequence[str] = ()
) -> Changes:
    """`before`: state per key. `folder`: where all of `found` lie, which is followed; None: they come from other sources, of
    which nothing counts as gone. `unread`: folders and files below `folder` that could not be read, so that neither they nor
    what is below them counts as gone; nor do items whose file lay elsewhere.

    Only files whose size or time differ, and new ones as large as one that is gone, are read. Remote pictures are not: with
    another size, version or address they are embedded again.
    """
    root = None if folder is None else f"{folder.resolve().as_uri().rstrip('/')}/"
    gone = {} if root is None else _gone(before, {picture.key for picture in found}, root, unread)
    sizes = {state.size for state in gone.values()}
    by_content: dict[str, list[str]] = {}
    for key, state in sorted(gone.items(), reverse=True):  # the first key is taken first
        if state.sha256 is not None:
            by_content.setdefault(state.sha256, []).append(key)
    changes = Changes([], [], [], [], [], [])
    for picture in found:
        old = before.get(picture.key)
        if old is None:
            short = len(picture.key.encode("utf-8", "replace")) <= MAX_KEY_BYTES
            if short and picture.size in sizes and (same := by_content.get(_digest(picture))):
                changes.moved.append((same.pop(), picture))
            else:
                changes.embed.append(picture)
        elif old.size is None:
            changes.owned.append(picture.key)
        else:
            elsewhere = old.uri != picture.uri if root is None else not old.uri.startswith(root)
            as_it_was = not elsewhere and (old.size, old.mtime_ns) == (picture.size, picture.mtime_ns)
            same_bytes = as_it_was or (
                old.sha256 is not None and old.size == picture.size and _digest(picture) == old.sha256
            )
            if not same_bytes:
                changes.embed.append(picture)
                if elsewhere:
                    changes.replaced.append(picture.key)
            elif elsewhere:
                changes.moved.append((picture.key, picture))
            elif not as_it_was:
                changes.touched.append(picture)
    left = gone.keys() - {key for key, _ in changes.moved}
    return changes._replace(gone=sorted(left))


def _gone(before: Mapping[str, FileState], found: set[str], root: str, unread: Sequence[str]) -> dict[str, FileState]:
    """Items of files below a folder that are not there any more."""
    here, hidden = found | set(unread), tuple(f"{name}/" for name in unread)
    return {
        key: state
        for key, state in before.items()
        if state.size is not None and key not in here and not key.startswith(hidden) and state.uri.startswith(root)
    }


def _digest(picture: Picture) -> str:
    """Of its bytes; '' where they cannot be had here: embedding it says why, or fetches it."""
    try:
        if isinstance(picture, PictureFile):
            return sha256_file(picture.path)
        if isinstance(picture, SourcePicture) and picture.is_remote:
            return ""
        return hashlib.sha256(picture.read()).hexdigest()
    except (OSError, UnreadablePictureError):
        return ""
