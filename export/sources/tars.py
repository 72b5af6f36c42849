"""Pictures in tar shards: an index of where each member lies, made in one pass over the headers."""

from __future__ import annotations

import json
import posixpath
import tarfile
import unicodedata
from pathlib import Path
from typing import IO, NamedTuple

from export.bundle import RefusalError, make_folder, sha256_json, write_file
from export.preprocess import SUFFIXES, first_folder

TAR_SUFFIX = ".tar"
FORMAT = 3  # of a stored index
_BLOCK = 512


class Member(NamedTuple):
    """A picture in a tar file."""

    key: str
    """Name of the tar without its suffix, `/`, name of the member, in Unicode NFC."""
    offset: int
    """Where its bytes begin."""
    size: int
    """How many there are."""
    label: str
    """Text of the `.cls` file of the same sample (WebDataset: the same name up to the first dot), otherwise the first
    folder of the member, or ''."""
    folder: str
    """The first folder of the member, or ''."""
    is_labelled: bool
    """Whether there is such a file."""


def tar_members(
    name: str,
    file: IO[bytes],
    size: int,
    unreadable: list[tuple[str, str]],
    index_folder: Path | None,
    identity: str,
) -> list[Member]:
    """`index_tar`, or what it gave before for a tar of this `identity` and size, from `index_folder`."""
    if index_folder is None:
        return index_tar(name, file, size, unreadable)
    path = index_folder / f"tar-{sha256_json([FORMAT, name, identity, size])[:24]}.json"
    try:
        stored = json.loads(path.read_bytes())
        if stored["seal"] == sha256_json([stored["members"], stored["unreadable"]]):
            unreadable += [(key, reason) for key, reason in stored["unreadable"]]
            return [Member(*row) for row in stored["members"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: made again
    left_out: list[tuple[str, str]] = []
    members = index_tar(name, file, size, left_out)
    unreadable += left_out
    if all(key != name for key, _ in left_out):  # a damaged tar is looked at again
        make_folder(index_folder)
        seal = sha256_json([members, left_out])
        write_file(path, json.dumps({"members": members, "unreadable": left_out, "seal": seal}))
    return members


class _Index:
    """What the headers of a tar say about its pictures."""

    def __init__(self) -> None:
        self.pictures: list[tuple[str, tuple[int, int] | None, str]] = []
        """Name, offset and size (None where they are to be looked up), why it cannot be read, or ''."""
        self.stretches: dict[str, tuple[int, int]] = {}
        """Offset and size of the regular members, for links."""
        self.links: dict[str, str] = {}
        """The name that a link leads to."""
        self.labels: dict[str, str] = {}

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Note a member."""
        path = _clean(member.name)
        base, _, suffix = path.rpartition(".")
        if path.rpartition("/")[2].startswith("."):
            return
        stretch, reason = None, ""
        if member.issparse():
            reason = "the member is sparse (has holes): write the tar without --sparse"
        elif member.isreg():
            stretch = self.stretches[path] = (member.offset_data, member.size)
        elif member.islnk():
            self.links[path] = _clean(member.linkname)
        elif member.issym():
            self.links[path] = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
        else:
            reason = "the member is not a file"
        if f".{suffix.lower()}" in SUFFIXES and not member.isdir():
            self.pictures.append((path, stretch, reason))
        elif suffix.lower() == "cls" and member.isreg() and member.size < 4096:
            content = archive.extractfile(member)
            self.labels[base] = content.read().decode("utf-8", "replace").strip() if content else ""

    def members(self, stem: str, unreadable: list[tuple[str, str]]) -> list[Member]:
        """The pictures; what cannot be read is appended to `unreadable`."""
        found = []
        for path, stretch, reason in self.pictures:
            if stretch is None and not reason:
                stretch = self._follow(path)
            if stretch is None:
                why = reason or f"the link leads to {self.links[path]}, which is no file in the tar"
                unreadable.append((f"{stem}/{path}", why))
            else:
                whole = path.rpartition(".")[0]
                label, folder = self.labels.get(whole, self.labels.get(_sample(path))), first_folder(path)
                given = folder if label is None else label
                found.append(Member(f"{stem}/{path}", *stretch, given, folder, label is not None))
        return found

    def _follow(self, path: str) -> tuple[int, int] | None:
        followed = {path}
        while path not in self.stretches:
            path = self.links.get(path, "")
            if not path or path in followed:
                return None
            followed.add(path)
        return self.stretches[path]


def index_tar(name: str, file: IO[bytes], size: int, unreadable: list[tuple[str, str]]) -> list[Member]:
    """The pictures in an uncompressed tar of `size` bytes, in its order; `file` is read at the headers only.

    Several tars in one file (`cat a.tar b.tar`) are read one after another. Links are followed to members of the tar.
    A damaged tar gives what comes before the damage; that, and pictures that cannot be read where they lie (sparse
    members, links that lead nowhere), are appended to `unreadable`. Raises `RefusalError` when the file is no tar at all.
    """
    found: list[Member] = []
    start: int | None = 0
    while start is not None:
        begun, start = start, None
        index, damage = _Index(), ""
        try:
            file.seek(begun)
            with _open(name, file) as archive:
                for member in archive:
                    if member.isreg() and not member.issparse() and member.offset_data + member.size > size > 0:
                        raise tarfile.ReadError("the last member is cut short")
                    index.add(archive, member)
                start = _next_tar(file, archive.offset)
        except (tarfile.TarError, EOFError, OSError) as e:
            damage = str(e)
        found += index.members(name.removesuffix(TAR_SUFFIX), unreadable)
        if damage:
            count = f"{len(found):,} pictures"
            unreadable.append((name, f"the tar is damaged after {count} ({damage}): the rest is left out"))
    return found


def _open(name: str, file: IO[bytes]) -> tarfile.TarFile:
    begun = file.tell()
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except (tarfile.ReadError, EOFError) as e:
        if begun:
            raise
        raise RefusalError(
            f"{name} is no uncompressed tar ({e}): members are read where they lie, so unpack .tar.gz to .tar first"
        ) from None


def _next_tar(file: IO[bytes], offset: int) -> int | None:
    """Where another tar begins behind the end of one at `offset`, which is blocks of zeros, or nothing; or None."""
    file.seek(offset)
    # tarfile takes a damaged header for the end.
    if file.read(_BLOCK).strip(b"\0"):
        raise tarfile.ReadError("a header is damaged")
    offset += _BLOCK
    while data := file.read(128 * _BLOCK):
        if filled := data.lstrip(b"\0"):
            return offset + (len(data) - len(filled)) // _BLOCK * _BLOCK
        offset += len(data)
    return None


def _clean(name: str) -> str:
    return unicodedata.normalize("NFC", name.removeprefix("./"))


def _sample(path: str) -> str:
    """WebDataset's name of the sample: up to the first dot of the base name."""
    folder, slash, base = path.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"
