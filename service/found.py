"""What `--images` and `--payload` of a build name: pictures of a folder or of other sources, and what is known of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from export.bundle import RefusalError, list_pictures, printable
from export.preprocess import find_pictures
from export.sources.listing import list_sources
from export.sources.picture import Picture, SourcePicture
from service.config import IndexBuild
from service.fields import Fields, check_fields, read_fields


class Found(NamedTuple):
    """What `--images` names."""

    pictures: Sequence[Picture]
    unreadable: list[tuple[str, str]]
    """(key, reason) of what was named and cannot be used."""
    folder: Path | None
    """The one folder that they lie in; None where they come from other sources."""
    name: str
    """For sentences."""


def find(asked: IndexBuild, follows: bool, is_there: bool) -> Found:
    """The pictures, of a shard where one was asked for. Raises `RefusalError`."""
    if asked.shard is not None and follows:
        raise RefusalError("a shard cannot follow a folder, of which it holds a part: sync without --shard, or build")
    name = ", ".join(asked.images)
    unread: list[tuple[str, str]] = []
    folder = Path(asked.images[0]) if len(asked.images) == 1 else None
    pictures: Sequence[Picture]
    if folder is not None and folder.is_dir():
        # None at all is an answer, too, where a collection follows them.
        pictures = find_pictures(folder, unread) if follows and is_there else list_pictures(folder, unread)
    elif follows:
        raise RefusalError(
            f"{name} {'is' if len(asked.images) == 1 else 'are'} not a folder, and sync follows one: give that, or add what "
            "other sources name with `likewise index build`, which deletes nothing"
        )
    else:
        folder = None
        # What tars hold is kept there until they change; nothing is written into a folder that may be another's.
        index = asked.out / "sources" if is_there or not asked.out.exists() else None
        sources = list_sources(asked.images, index, with_fields=True)
        pictures, unread = sources.items, sources.unreadable
        for picture in pictures:
            if fields_of(picture):
                check_fields(fields_of(picture), f"what the list says of {printable(picture.key)}")
    if asked.shard is not None:
        number, shards = map(int, asked.shard.split("/"))
        if number > shards:
            raise RefusalError(f"there is no shard {number} of {shards}: write i/n, with i from 1 to n")
        pictures = [p for p in pictures if zlib.crc32(p.key.encode("utf-8", "replace")) % shards == number - 1]
    return Found(pictures, unread, folder, name)


def table_of(asked: IndexBuild, found: Found) -> Fields | None:
    """What --payload says. Raises `RefusalError` where it says nothing of any picture."""
    if asked.payload is None:
        return None
    table = read_fields(asked.payload)
    if not any(picture.key in table for picture in found.pictures):
        example = found.pictures[0].key if found.pictures else "shelf/1.jpg"
        raise RefusalError(
            f"{asked.payload} has no row for any picture of {found.name}: its keys must be "
            f"{'those of the sources' if found.folder is None else 'paths below the folder'}, such as {example}"
        )
    return table


def fields_of(picture: Picture) -> str:
    """What its source says of it, a JSON object or ''."""
    return picture.fields if isinstance(picture, SourcePicture) else ""
