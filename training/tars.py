"""Pictures in tar shards: an index of where each member lies, made in one pass over the headers."""

from __future__ import annotations

import json
import tarfile
import unicodedata
from pathlib import Path
from typing import IO, NamedTuple

from export.bundle import RefusalError, make_folder, sha256_json, write_file
from export.preprocess import SUFFIXES, first_folder

TAR_SUFFIX = ".tar"


class Member(NamedTuple):
    """A picture in a tar file."""

    key: str
    """Name of the tar without its suffix, `/`, name of the member, in Unicode NFC."""
    offset: int
    """Where its bytes begin."""
    size: int
    """How many there are."""
    label: str
    """Text of the `.cls` file of the same stem (WebDataset), otherwise the first folder of the member, or ''."""


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
    path = index_folder / f"tar-{sha256_json([name, identity, size])[:24]}.json"
    try:
        stored = json.loads(path.read_bytes())
        if stored["seal"] == sha256_json(stored["members"]):
            return [Member(*row) for row in stored["members"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: made again
    damaged: list[tuple[str, str]] = []
    members = index_tar(name, file, size, damaged)
    unreadable += damaged
    if not damaged:
        make_folder(index_folder)
        write_file(path, json.dumps({"members": members, "seal": sha256_json(members)}))
    return members


def index_tar(name: str, file: IO[bytes], size: int, unreadable: list[tuple[str, str]]) -> list[Member]:
    """The pictures in an uncompressed tar of `size` bytes, in its order; `file` is read at the headers only.

    A damaged tar gives what comes before the damage, which is appended to `unreadable`. Raises `RefusalError` when the
    file is no tar at all.
    """
    stem = name.removesuffix(TAR_SUFFIX)
    found: list[tuple[str, int, int]] = []
    labels: dict[str, str] = {}
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    except (tarfile.ReadError, EOFError) as e:
        raise RefusalError(
            f"{name} is no uncompressed tar ({e}): members are read where they lie, so unpack .tar.gz to .tar first"
        ) from None
    with archive:
        try:
            for member in archive:
                path = unicodedata.normalize("NFC", member.name.removeprefix("./"))
                if not member.isreg() or member.issparse() or path.rpartition("/")[2].startswith("."):
                    continue
                base, _, suffix = path.rpartition(".")
                if member.offset_data + member.size > size > 0:
                    raise tarfile.ReadError("the last member is cut short")
                if f".{suffix.lower()}" in SUFFIXES:
                    found.append((path, member.offset_data, member.size))
                elif suffix == "cls" and member.size < 4096:
                    content = archive.extractfile(member)
                    labels[base] = content.read().decode("utf-8", "replace").strip() if content else ""
            # tarfile takes a damaged header for the end; the real end is zeros, or nothing.
            file.seek(archive.offset)
            if file.read(512).strip(b"\0"):
                raise tarfile.ReadError("a header is damaged")
        except (tarfile.TarError, EOFError, OSError) as e:
            unreadable.append((name, f"the tar is damaged after {len(found):,} pictures ({e}): the rest is left out"))
    return [
        Member(f"{stem}/{path}", offset, length, labels.get(path.rpartition(".")[0], first_folder(path)))
        for path, offset, length in found
    ]
