"""Where pictures come from: folders, globs, lists (CSV, TSV, JSONL, Parquet), tar shards, and URLs of the same by fsspec.

A *spec* is what the user types. `{0000..0009}` expands as in a shell. Tar members are read where they lie in the archive
(WebDataset's layout: files of one stem form a sample, `.cls` holds its label), never unpacked.
"""

from __future__ import annotations

import glob
import json
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from export.bundle import RefusalError, list_pictures
from export.preprocess import SUFFIXES, PictureFile, UnreadablePictureError, first_folder, key_of
from export.sources.lists import LIST_SUFFIXES, read_list
from export.sources.picture import NO_RANGES, Picture, SourcePicture
from export.sources.tars import TAR_SUFFIX, tar_members
from export.sources.urls import URL, beside, chained, is_url, open_url, version_of, why_unknown

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAGIC = re.compile(r"[*?\[]")


@dataclass
class Sources:
    """What `list_sources` found."""

    items: list[Picture] = field(default_factory=list)
    """The pictures: in the order of the specs, each spec's in its own order."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of what was named but cannot be used."""
    name: str = ""
    """The specs, for fingerprints and messages."""

    @property
    def labels(self) -> list[str | None]:
        """A label per item, None where it has none."""
        return [item.folder or None for item in self.items]


def list_sources(specs: Sequence[str], index_folder: Path | None = None, with_fields: bool = False) -> Sources:
    """All pictures that `specs` name, with unique keys; `with_fields` (pyarrow) with what lists and tars say of them.

    A single folder gives `PictureFile`s under their paths below it; several specs prefix each key with the spec's name.
    Labels are a list's `label` column, a tar's `.cls` files, otherwise the first folder of the key.

    The index of a tar is kept in `index_folder`, where one is given, until the tar changes.

    Raises `RefusalError` when a spec is wrong or holds no picture.
    """
    expanded = [part for spec in specs for part in expand_braces(spec)]
    if not expanded:
        raise RefusalError("no pictures were named: give a folder, a glob, a list, tar shards or a URL")
    sources = Sources(name=" ".join(specs))
    if len(expanded) == 1 and not is_url(expanded[0]) and Path(expanded[0]).is_dir():
        folder = Path(expanded[0])
        sources.items += list_pictures(folder, sources.unreadable)
        sources.name = str(folder.resolve())
        return sources
    taken: set[str] = set()
    for spec in expanded:
        unreadable: list[tuple[str, str]] = []
        finder = _Finder(unreadable, index_folder, with_fields)
        found = list(finder.remote(spec) if is_url(spec) else finder.local(spec))
        if not found:
            why = f": for example {unreadable[0][0]}: {unreadable[0][1]}" if unreadable else ": check the spelling"
            raise RefusalError(f"{spec} gives no picture that can be used (.jpg, .png, …){why}")
        sources.unreadable += unreadable
        prefix = f"{_stem(spec)}/" if len(expanded) > 1 and not _is(spec, (TAR_SUFFIX,)) else ""
        for item in found:
            key = prefix + item.key
            while key in taken:
                key += "~"
            taken.add(key)
            sources.items.append(_renamed(item, key))
    return sources


def expand_braces(spec: str) -> list[str]:
    """`shard-{0000..0002}.tar` → three names; the width of the first number is kept."""
    match = _BRACES.search(spec)
    if match is None:
        return [spec]
    first, last = match[1], match[2]
    if int(last) < int(first) or int(last) - int(first) > 10**6:
        raise RefusalError(f"{spec}: {match[0]} does not count up from {first}: write {{FIRST..LAST}}")
    names = (
        f"{spec[: match.start()]}{n:0{len(first)}d}{spec[match.end() :]}" for n in range(int(first), int(last) + 1)
    )
    return [name for part in names for name in expand_braces(part)]


class _Finder:
    """Finds the pictures of one spec."""

    def __init__(self, unreadable: list[tuple[str, str]], index_folder: Path | None, with_fields: bool) -> None:
        self._unreadable = unreadable
        self._index_folder = index_folder
        self._with_fields = with_fields
        self._has_ranges = False

    def local(self, spec: str) -> Iterator[Picture]:
        """Of a local path or glob."""
        path = Path(spec)
        if path.is_dir():
            yield from list_pictures(path, self._unreadable)
        elif path.is_file():
            yield from self._file(path, path.parent)
        elif _MAGIC.search(spec):
            # Keys are relative to the part before the first wildcard.
            fixed = list(_before_magic(path.parts))
            root = Path(*fixed) if fixed else Path()
            for name in sorted(glob.glob(spec, recursive=True)):  # noqa: PTH207 (Path.glob takes no absolute pattern)
                if Path(name).is_file() and _is(name, (*SUFFIXES, *_named_lists(spec), TAR_SUFFIX)):
                    yield from self._file(Path(name), root)
        else:
            raise RefusalError(f"{spec} does not exist: give a folder, a glob, a list, tar shards or a URL")

    def remote(self, url: str) -> Iterator[Picture]:
        """Of a URL."""
        files, path = open_url(url)
        try:
            if _MAGIC.search(path) and not files.exists(path):
                infos = files.glob(path, detail=True)
                root = "/".join(_before_magic(path.split("/")))
            elif files.isdir(path):
                infos, root = files.find(path, detail=True), path
            else:
                infos, root = {path: files.info(path)}, path.rpartition("/")[0]
        except Exception as e:  # clients of stores raise their own classes (aiohttp, botocore)
            reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
            raise RefusalError(f"{url} cannot be listed ({reason}): check the address and your access to it") from None
        for name, info in sorted(infos.items()):
            key = unicodedata.normalize("NFC", name[len(root) :].lstrip("/"))
            size, version = int(info.get("size") or 0), version_of(info)
            full = chained(url, files.unstrip_protocol(name))
            if info.get("type") == "directory":
                continue
            if _is(name, _named_lists(path)):
                yield from self._listed(full, files.cat_file(name))
            elif _is(name, (TAR_SUFFIX,)):
                with files.open(name, "rb") as file:
                    members = list(self._tar_members(PurePosixPath(name).name, file, size, version, full))
                self._try_ranges(full, members[:1])
                yield from members
            elif _is(name, tuple(SUFFIXES)):
                yield SourcePicture(key, size, version, first_folder(key), full)

    def _file(self, path: Path, root: Path) -> Iterator[Picture]:
        name = path.name.lower()
        if name.endswith(LIST_SUFFIXES):
            yield from self._listed(str(path), path.read_bytes())
        elif name.endswith(TAR_SUFFIX):
            status = path.stat()
            with path.open("rb") as file:
                yield from self._tar_members(path.name, file, status.st_size, status.st_mtime_ns, path)
        elif path.suffix.lower() in SUFFIXES:
            status = path.stat()
            yield PictureFile(key_of(path, root), path, status.st_size, status.st_mtime_ns)
        else:
            raise RefusalError(
                f"{path} is neither a picture nor a list ({', '.join(LIST_SUFFIXES)}) nor a tar shard (.tar): "
                "give one of those"
            )

    def _tar_members(self, name: str, file: Any, size: int, version: int, where: Path | str) -> Iterator[SourcePicture]:
        for member in tar_members(name, file, size, self._unreadable, self._index_folder, f"{where}/{version}"):
            fields = self._fields(member.folder, member.label) if member.is_labelled else ""
            yield SourcePicture(member.key, member.size, version, member.label, where, member.offset, fields)

    def _try_ranges(self, url: str, members: Sequence[SourcePicture]) -> None:
        """Read the first member of the first remote tar. Raises `RefusalError` where its server knows no ranges."""
        if self._has_ranges:
            return
        for member in members:
            try:
                member.read()
                self._has_ranges = True
            except UnreadablePictureError as e:  # of the member itself, building says it
                if str(e) == NO_RANGES:
                    raise RefusalError(f"{url}: {NO_RANGES}") from None

    def _listed(self, where: str, data: bytes) -> Iterator[SourcePicture]:
        """The pictures of a list; relative paths start at the list's folder."""
        remote = is_url(where)
        seen: dict[str, int] = {}
        for line, name, label, fields in read_list(where, data, self._with_fields):
            key = unicodedata.normalize("NFC", name)
            if key in seen:
                self._unreadable.append((key, f"line {line} of the list repeats line {seen[key]}"))
                continue
            seen[key] = line
            folder = "" if is_url(key) else first_folder(key)
            if label is not None:
                fields = self._fields(folder, label, fields)
                folder = label
            if remote and not is_url(name):
                name = beside(where, name)
            if is_url(name):
                if reason := why_unknown(name, f"{where} line {line}"):
                    self._unreadable.append((key, f"line {line} of the list {reason}"))
                    continue
                yield SourcePicture(key, 0, 0, folder, name, fields=fields)
                continue
            path = Path(where).parent / name
            try:
                status = path.stat()
            except (OSError, ValueError) as e:
                reason = getattr(e, "strerror", None) or str(e)
                self._unreadable.append((key, f"line {line} of the list names a file that cannot be opened ({reason})"))
                continue
            if not stat.S_ISREG(status.st_mode):
                self._unreadable.append((key, f"line {line} of the list names something that is not a file"))
                continue
            yield SourcePicture(key, status.st_size, status.st_mtime_ns, folder, path, fields=fields)

    def _fields(self, folder: str, label: str, others: str = "") -> str:
        """The fields of a picture that has a label, which is not its folder."""
        if not self._with_fields:
            return ""
        known = {"folder": folder, **({"label": label} if label else {})}
        return json.dumps({**known, **(json.loads(others) if others else {})})


def _named_lists(pattern: str) -> tuple[str, ...]:
    """The suffix of lists with which a pattern ends: in folders and under wildcards, lists are taken when asked for."""
    return tuple(suffix for suffix in LIST_SUFFIXES if pattern.lower().endswith(suffix))


def _before_magic(parts: Sequence[str]) -> Iterator[str]:
    for part in parts[:-1]:
        if _MAGIC.search(part):
            return
        yield part


def _renamed(item: Picture, key: str) -> Picture:
    """Under another key; what it was labelled with stays."""
    if isinstance(item, SourcePicture):
        return replace(item, key=key)
    assert isinstance(item, PictureFile)
    return item if key == item.key else SourcePicture(key, item.size, item.mtime_ns, item.folder, item.path)


def _is(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(tuple(suffixes))


def _stem(spec: str) -> str:
    """A short name of a spec: its last part that holds no wildcard."""
    parts = [part for part in URL.sub("", spec).rstrip("/").split("/") if part and not _MAGIC.search(part)]
    return PurePosixPath(parts[-1]).stem if parts else "pictures"
