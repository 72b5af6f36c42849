"""What changed in a folder since a collection last followed it: seen by size and time of change, decided by the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from export.bundle import sha256_file
from export.preprocess import PictureFile
from service.records import MAX_KEY_BYTES, FileState


class Changes(NamedTuple):
    """What must be done so that a collection follows a folder."""

    embed: list[PictureFile]
    """New files, and those with other bytes."""
    touched: list[PictureFile]
    """The same bytes at another time."""
    moved: list[tuple[str, PictureFile]]
    """(old key, file): the bytes of an item whose own file is gone, under a new name; or the same name elsewhere."""
    gone: list[str]
    """Keys of items whose file is gone."""
    replaced: list[str]
    """Keys of items from files elsewhere that files of this folder, with other bytes, take over."""
    owned: list[str]
    """Keys of files whose item a client wrote: they are left alone."""


def compare(
    before: Mapping[str, FileState], found: Sequence[PictureFile], folder: Path, unread: Sequence[str] = ()
) -> Changes:
    """`before`: state per key. `unread`: folders and files below `folder` that could not be read, so that neither they nor
    what is below them counts as gone; nor do items whose file lay elsewhere.

    Only files whose size or time differ, and new ones as large as one that is gone, are read.
    """
    here = {picture.key for picture in found} | set(unread)
    hidden = tuple(f"{name}/" for name in unread)
    root = f"{folder.resolve().as_uri().rstrip('/')}/"
    gone = {
        key: state
        for key, state in before.items()
        if state.size is not None and key not in here and not key.startswith(hidden) and state.uri.startswith(root)
    }
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
            elsewhere = not old.uri.startswith(root)
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


def _digest(picture: PictureFile) -> str:
    try:
        return sha256_file(picture.path)
    except OSError:
        return ""  # embedding it will say why
