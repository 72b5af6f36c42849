"""Picture sets to evaluate on: files with their labels, read as bytes, and the digest that names them."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from export.bundle import RefusalError, list_pictures, sha256_json
from export.preprocess import PictureFile


class PictureSet(NamedTuple):
    """Pictures of one role."""

    name: str
    """What the role is called in the output: queries, gallery, bank."""
    folder: Path
    """Where they lie."""
    pictures: list[PictureFile]
    """In key order."""

    def only(self, rows: Sequence[int], name: str | None = None) -> PictureSet:
        """A part of it, in the order of `rows`."""
        return PictureSet(name or self.name, self.folder, [self.pictures[i] for i in rows])


def read_set(name: str, folder: Path, unreadable: list[tuple[str, str]]) -> PictureSet:
    """The pictures below `folder`. Raises `RefusalError` where there are none."""
    return PictureSet(name, folder, list_pictures(folder, unreadable))


def own_rows(queries: PictureSet, gallery: PictureSet) -> npt.NDArray[np.int64]:
    """[Q] each query's own file in the gallery, −1 where it is not there; links are followed."""
    rows = {picture.path.resolve(): i for i, picture in enumerate(gallery.pictures)}
    return np.asarray([rows.get(picture.path.resolve(), -1) for picture in queries.pictures], np.int64)


def digest(pictures: Sequence[PictureFile]) -> str:
    """Hex digest over resolved folders, keys, sizes and times of change, in order: which pictures, without reading them.

    Keys, sizes and times alone may be those of another folder, where an archive set all times alike.
    """
    folders = {folder: str(folder.resolve()) for folder in {p.path.parent for p in pictures}}
    return sha256_json([[folders[p.path.parent], p.path.name, p.key, p.size, p.mtime_ns] for p in pictures])


class Labels:
    """Label of a picture: from a list (`--labels`), or the first folder below the set's folder.

    A path in the list is absolute, or relative to the folder of its set; a row with an empty label gives none. Raises
    `RefusalError` for a list that gives one path two labels.

    Attributes: `source`, a sentence fragment that says which.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._by_path: dict[str, str] | None = None
        self._used: dict[str, str] = {}  # path in the list → the file that it was taken for
        self.source = "the first folder's name" if file is None else f"the list {file.name}"
        if file is None:
            return
        self._by_path = {}
        for row in _read_table(file, ("path", "label")):
            path, label = unicodedata.normalize("NFC", row["path"]), row["label"].strip()
            if self._by_path.setdefault(path, label) != label:
                raise RefusalError(
                    f"{file} gives {path} the labels {self._by_path[path]!r} and {label!r}: leave one row per picture"
                )

    def of(self, pictures: PictureSet) -> list[str | None]:
        """A label per picture, None where it has none.

        Raises `RefusalError` for a list that names none of them, or whose relative path fits pictures of two sets.
        """
        if self._by_path is None:
            names = [p.folder for p in pictures.pictures]
            return [name or None for name in names] if len(set(names)) > 1 else [None] * len(names)
        found: list[str | None] = []
        named = False
        for picture in pictures.pictures:
            whole = str(picture.path.absolute()), str(picture.path.resolve()), str(picture.path)
            names = [*(unicodedata.normalize("NFC", n) for n in whole), picture.key]
            name = next((n for n in names if n in self._by_path), None)
            found.append((self._by_path[name] or None) if name is not None else None)
            if name is not None:
                named = True
                if (first := self._used.setdefault(name, whole[1])) != whole[1]:
                    raise RefusalError(
                        f"{self._file} names {name}, which fits both {first} and {whole[1]}: give absolute paths for "
                        "pictures whose relative paths two folders share"
                    )
        if not named:
            raise RefusalError(
                f"{self._file} names none of the {len(found)} pictures in {pictures.folder}: expected in its column "
                f"`path` names relative to that folder, such as {pictures.pictures[0].key}"
            )
        return found


def read_pairs(file: Path) -> dict[str, list[str]]:
    """--pairs: query → its originals, from columns `query` and `original`; a query may stand in several rows, and a row
    that is there twice counts once.

    Raises `RefusalError`.
    """
    pairs: dict[str, list[str]] = {}
    for row in _read_table(file, ("query", "original")):
        query, original = (unicodedata.normalize("NFC", row[column]) for column in ("query", "original"))
        originals = pairs.setdefault(query, [])
        if original and original not in originals:
            originals.append(original)
    return pairs


def _read_table(file: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV with a header, or of a file with a JSON object per line (.jsonl). Raises `RefusalError`."""
    expected = f"expected a CSV with the header {','.join(columns)}, or .jsonl with these names in each line"
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows: list[dict[str, Any]]
        if file.suffix.lower() in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, csv.Error) as e:
        raise RefusalError(f"{file} cannot be read as a list ({e}): {expected}") from None
    if not rows:
        raise RefusalError(f"{file} holds no rows: {expected}")
    for number, row in enumerate(rows, 1):
        missing = [c for c in columns if not isinstance(row, dict) or row.get(c) is None]
        if missing:
            raise RefusalError(f"{file} lacks {missing[0]!r} in row {number}: {expected}")
    return [{c: str(row[c]) for c in columns} for row in rows]


class Classes(NamedTuple):
    """Labels of several sets as numbers."""

    names: list[str]
    """Sorted."""
    numbers: list[np.ndarray[Any, np.dtype[np.int64]]]
    """Per set, −1 for no label."""


def enumerate_classes(*sets: list[str | None]) -> Classes:
    """One numbering for all sets."""
    names = sorted({label for labels in sets for label in labels if label is not None})
    number = {name: i for i, name in enumerate(names)}
    return Classes(names, [np.asarray([-1 if v is None else number[v] for v in labels], np.int64) for labels in sets])


class LazyPictures(Sequence[bytes]):
    """Encoded pictures, read when asked for."""

    def __init__(self, pictures: Sequence[PictureFile]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [p.read() for p in self._pictures[index]]
        return self._pictures[index].read()
