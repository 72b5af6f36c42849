"""URLs as fsspec reads them, chained ones (`zip://*.png::s3://bucket/z.zip`) included."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import Any

from export.bundle import RefusalError

URL = re.compile(r"^[a-z][a-z0-9+]*(::[a-z][a-z0-9+]*)*://", re.IGNORECASE)

_VERSIONS = ("ETag", "etag", "md5Hash", "md5", "LastModified", "last_modified", "mtime", "updated", "created", "CRC")


def is_url(text: str) -> bool:
    """Whether a text is a URL rather than a path."""
    return URL.match(text) is not None


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises `RefusalError` where its client is not installed."""
    try:
        import fsspec
    except ModuleNotFoundError:
        raise RefusalError(f"{url} needs the package fsspec: pip install fsspec") from None
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as e:  # fsspec names the missing client
        raise RefusalError(f"{url} needs a package that is not installed ({e}): install it") from None
    except ValueError as e:
        raise RefusalError(f"{url} is no URL that fsspec knows ({e}): use s3://, gs://, https:// or file://") from None
    return files, path


def why_unknown(url: str, place: str) -> str:
    """Why fsspec cannot open such a URL, '' if it can. Raises `RefusalError` where a package is missing."""
    try:
        return _why_unknown(tuple(part.partition("://")[0].lower() for part in url.split("::")))
    except ImportError as e:
        raise RefusalError(f"{place} ({url}) needs a package that is not installed ({e}): install it") from None


@cache
def _why_unknown(protocols: tuple[str, ...]) -> str:
    import fsspec

    try:
        for protocol in protocols:
            fsspec.get_filesystem_class(protocol)
    except ValueError as e:
        return f"names a URL that fsspec does not know ({e})"
    return ""


def chained(url: str, found: str) -> str:
    """The whole address of what was found in a chained URL (`zip://*.png::s3://b/z.zip`); fsspec gives its first part."""
    head, joint, rest = url.partition("::")
    if not joint:
        return found
    if found.partition("://")[0] == head.partition("://")[0]:
        return f"{found}::{rest}"
    return f"{head}::{chained(rest, found)}"  # a cache, which fsspec leaves out


def beside(url: str, name: str) -> str:
    """The address of a file in the folder of another."""
    head, joint, rest = url.partition("::")
    protocol, is_path, path = head.partition("://")
    if not is_path:
        return f"{head}::{beside(rest, name)}"
    return f"{protocol}://{path[: path.rfind('/') + 1]}{name}{joint}{rest}"


def version_of(info: dict[str, Any]) -> int:
    """A number that changes with a remote file: from its etag or checksum, otherwise its time of last change."""
    for name in _VERSIONS:
        if info.get(name):
            return int.from_bytes(hashlib.sha256(str(info[name]).encode()).digest()[:8], "big") >> 1
    return 0
