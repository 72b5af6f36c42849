"""A picture as the data path sees it, wherever it comes from."""

from __future__ import annotations

from typing import Protocol


class Picture(Protocol):
    """What the cache needs of a source's picture: `PictureFile` and the items of `training/sources.py`."""

    @property
    def key(self) -> str:
        """Unique name, UTF-8."""

    @property
    def size(self) -> int:
        """Bytes of the encoded picture, 0 where unknown."""

    @property
    def mtime_ns(self) -> int:
        """Changes whenever the contents do."""

    @property
    def folder(self) -> str:
        """Label, or ''."""

    def read(self) -> bytes:
        """The encoded picture. Raises `UnreadablePictureError`, from the `OSError` where reading failed."""
