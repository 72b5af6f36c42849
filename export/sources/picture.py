"""A picture as the data path sees it, and one of a source: a whole file or a stretch of one, local or remote."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote_to_bytes, urlsplit

from export.bundle import RefusalError
from export.preprocess import DEFAULT_LIMITS, DecodeLimits, UnreadablePictureError, file_uri, first_folder
from export.sources.urls import is_url, open_url

NO_RANGES = (
    "the server sends whole files where parts are asked for (HTTP ranges), so that members of a tar cannot be read where "
    "they lie: download the tar, or serve it with ranges"
)
_ATTEMPTS = 3
_RANGE = "#bytes="
_FILE = re.compile(r"^(file|local)://", re.IGNORECASE)


class Picture(Protocol):
    """What training's cache and the builder need: `PictureFile` and `SourcePicture`."""

    @property
    def key(self) -> str:
        """Unique name, UTF-8."""

    @property
    def size(self) -> int:
        """Bytes of the encoded picture, 0 where unknown."""

    @property
    def mtime_ns(self) -> int:
        """Changes whenever the contents do, 0 where unknown."""

    @property
    def folder(self) -> str:
        """Label, or ''."""

    @property
    def uri(self) -> str:
        """Where it lies: what `picture_at` reads again."""

    def read(self, limits: DecodeLimits = DEFAULT_LIMITS) -> bytes:
        """The encoded picture. Raises `UnreadablePictureError`, from the `OSError` where reading failed."""


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """A picture of a source: a whole file, or a stretch of one."""

    key: str
    """Unique name in its `Sources`, UTF-8, with `/`."""
    size: int
    """Bytes, 0 where unknown."""
    mtime_ns: int
    """Changes with the contents: time of last change, or a number made from the store's etag; 0 where unknown."""
    folder: str
    """Label, or ''."""
    where: Path | str
    """A local path or a URL."""
    offset: int | None = None
    """Where it begins in that file; None for the whole file."""
    fields: str = ""
    """What a list says of it beyond path and label, as a JSON object; '' for nothing."""

    @property
    def label(self) -> str | None:
        """`folder`, None for ''."""
        return self.folder or None

    @property
    def is_remote(self) -> bool:
        """Whether it lies behind a URL."""
        return isinstance(self.where, str)

    @property
    def uri(self) -> str:
        """`file:///…` or the URL; a stretch as `#bytes=FIRST-LAST`, both included as in HTTP."""
        if isinstance(self.where, str):
            whole = file_uri(Path(_FILE.sub("", self.where))) if _FILE.match(self.where) else self.where
        else:
            whole = file_uri(self.where)
        return whole if self.offset is None else f"{whole}{_RANGE}{self.offset}-{self.offset + self.size - 1}"

    def read(self, limits: DecodeLimits = DEFAULT_LIMITS) -> bytes:
        """The encoded picture. Raises `UnreadablePictureError`, from the `OSError` where reading failed."""
        if self.size > limits.max_bytes:
            raise UnreadablePictureError(
                "IMAGE_TOO_LARGE",
                f"the picture has {self.size:,} bytes, at most {limits.max_bytes:,} are accepted: shrink it first",
            )
        try:
            data = self._remote(self.where) if isinstance(self.where, str) else self._local(self.where)
        except RefusalError as e:  # of one URL among many
            raise UnreadablePictureError("IMAGE_UNDECODABLE", str(e)) from None
        except OSError as e:
            why = e.strerror or str(e) or type(e).__name__
            raise UnreadablePictureError("IMAGE_UNDECODABLE", f"the file cannot be read ({why})") from e
        if self.offset is not None and len(data) != self.size:
            why = (
                f"the file ends before byte {self.offset + self.size:,}: it was cut or replaced"
                if len(data) < self.size
                else NO_RANGES
            )
            raise UnreadablePictureError("IMAGE_UNDECODABLE", why)
        return data

    def _local(self, path: Path) -> bytes:
        if self.offset is None:
            return path.read_bytes()
        with path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def _remote(self, url: str) -> bytes:
        start = self.offset
        end = None if start is None else start + self.size
        for attempt in range(_ATTEMPTS):
            try:
                files, path = open_url(url)
                data: bytes = files.cat_file(path, start=start, end=end)
                return data
            except (RefusalError, FileNotFoundError, PermissionError):
                raise
            except OSError:
                if attempt == _ATTEMPTS - 1:
                    raise
            except Exception as e:  # clients of stores raise their own classes (aiohttp, botocore)
                if attempt == _ATTEMPTS - 1:
                    raise OSError(None, f"{type(e).__name__}: {e}") from None
        raise AssertionError("unreachable")


def picture_at(uri: str, key: str) -> SourcePicture:
    """The picture that lies at the `uri` of another, under a key.

    Size and time are those of a local file that is there; of a remote one they are not asked for and 0, except for the size
    of a stretch. Whatever is wrong with the file, `read` says. Where URIs come from clients, what they name is for the
    caller to trust. Raises `RefusalError` where `uri` names no picture.
    """
    whole, has_range, asked = uri.rpartition(_RANGE)
    if not has_range:
        whole = uri
    offset, size = _stretch(uri, asked) if has_range else (None, 0)
    if not is_url(whole):
        raise RefusalError(
            f"{uri!r} is no address of a picture: expected file:///… or a URL, as a build has written it"
        )
    if not _FILE.match(whole):
        return SourcePicture(key, size, 0, first_folder(key), whole, offset)
    try:
        address = urlsplit(whole)
    except ValueError:  # such as an unclosed bracket
        address = urlsplit("")
    if address.netloc not in ("", "localhost") or not address.path.startswith("/"):
        raise RefusalError(f"{uri!r} is no file of this machine: expected file:///FOLDER/FILE")
    path = Path(os.fsdecode(unquote_to_bytes(address.path)))
    status = _status(path)
    mtime_ns = 0 if status is None else status.st_mtime_ns
    if offset is None and status is not None:
        size = status.st_size
    return SourcePicture(key, size, mtime_ns, first_folder(key), path, offset)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def _stretch(uri: str, asked: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,18})-(\d{1,18})", asked, re.ASCII)
    if found is None or int(found[2]) < int(found[1]):
        raise RefusalError(f"{uri!r} names no stretch of a file: expected #bytes=FIRST-LAST, both included, at its end")
    return int(found[1]), int(found[2]) - int(found[1]) + 1
