"""The collections of a server: a folder of them, or a single one."""

from __future__ import annotations

import re
import shutil
import threading
import uuid
from collections.abc import Collection as Known
from pathlib import Path

from pydantic import Field

from export.bundle import Contract, RefusalError, Sealed, make_folder, read_contract, sync_folder, write_file
from service.collection import Collection
from service.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, PreconditionError
from service.follower import Follower
from service.reading import Readable
from service.served import Served, read_only

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
THUMBNAIL_PIXELS = range(32, 1025)
NAME_RULE = "1 to 63 of a-z, 0-9, '-' and '_' are allowed, starting with a letter or digit"
POINTERS = "releases.json"
POINTERS_FORMAT = 1


class Pointer(Contract):
    """Which release a collection is served from."""

    live: str
    """Its name; '' is what lies in the folder of collections."""
    previous: str | None = None
    """What was served before, and can be again; None where that was given up."""


class Pointers(Sealed):
    """releases.json, beside the collections: those that are, or were, served from a release."""

    format_version: int = POINTERS_FORMAT
    """Format of the file."""
    collections: dict[str, Pointer] = Field(default_factory=dict)
    """By name."""


def read_pointers(folder: Path) -> dict[str, Pointer]:
    """Which of a folder's collections are served from a release. Raises `RefusalError` on a damaged file."""
    path = folder / POINTERS
    if not path.is_file():
        return {}
    what_to_do = (
        f"restore it from a backup, or write it anew with the releases that were served (see {POINTERS} in the docs)"
    )
    return dict(read_contract(path, Pointers, POINTERS_FORMAT, what_to_do).collections)


class Store:
    """Opens every collection of a folder; the spaces of a server's encoders are known."""

    def __init__(self, folder: Path, spaces: Known[str], releases: Path | None = None, follow: bool = False) -> None:
        """`folder` is a collection, or holds collections (it is made where absent). `spaces`: those that may be served.
        `releases`: the folder of those that collections may be served from. `follow`: another process writes them.

        Raises `RefusalError` when any of them cannot be served: a server that starts serves everything it was given.
        """
        self._lock = threading.Lock()  # held for a moment only: the event loop takes it too
        self._changing = threading.Lock()  # held through creations and deletions
        self._served: dict[str, Served] = {}
        self._spaces, self._releases = spaces, releases
        self.follows = follow
        self.problems: dict[str, str] = {}
        """Of a server that follows: why collections that are there are not served, by name."""
        single = (folder / "collection.json").is_file()
        self._root = None if single else folder
        self._pointers = {} if single else read_pointers(folder)
        if not single:
            try:
                make_folder(folder)
            except OSError as e:
                raise RefusalError(
                    f"{folder} cannot be used for collections ({e.strerror}): choose another folder"
                ) from e
            if not follow:
                for leftover in [*folder.glob(".deleted-*"), *(releases.glob("*/.deleted-*") if releases else ())]:
                    shutil.rmtree(leftover)
        self._folder = folder
        try:
            for name, path in sorted(self._places(self._pointers).items()):
                if not NAME.fullmatch(name):
                    raise RefusalError(f"{path} has a name that the API cannot carry: rename it; {NAME_RULE}")
                was_another = name in self._pointers and self._pointers[name].previous is not None
                self._served[name] = Served(self.open(path), was_another)
        except RefusalError:
            self.close()
            raise

    def _places(self, pointers: dict[str, Pointer]) -> dict[str, Path]:
        """Where the collections lie, by name."""
        folders = [self._folder] if self._root is None else [p.parent for p in self._folder.glob("*/collection.json")]
        places = {path.name: path for path in folders}
        return places | {name: self.place(name, pointer.live) for name, pointer in pointers.items() if pointer.live}

    def rescan(self) -> list[Served]:
        """Of a server that follows: see which collections there are now, and return those that are no more."""
        pointers = {} if self._root is None else read_pointers(self._root)
        places = {name: path for name, path in self._places(pointers).items() if NAME.fullmatch(name)}
        gone: list[Served] = []
        problems: dict[str, str] = {}
        with self._changing:
            for name, served in list(self._served.items()):
                path, collection = places.get(name), served.collection
                if path == collection.folder and isinstance(collection, Follower) and collection.is_there:
                    del places[name]
                    served.was_another = pointers.get(name, Pointer(live="")).previous is not None
                elif path is None or not (path / "collection.json").is_file():
                    with self._lock:
                        gone.append(self._served.pop(name))
            for name, path in places.items():
                pointer = pointers.get(name, Pointer(live=""))
                try:
                    served = Served(self.open(path), pointer.previous is not None)
                except RefusalError as e:  # one that is just being made, or of an encoder that is not loaded
                    problems[name] = str(e)
                    continue
                with self._lock:
                    gone += [self._served[name]] if name in self._served else []
                    self._served[name] = served
            self._pointers, self.problems = pointers, problems
        return gone

    def look(self) -> None:
        """Of a server that follows: see what was committed to each collection."""
        for collection in self.all():
            if isinstance(collection, Follower):
                collection.look()

    def open(self, folder: Path) -> Readable:
        """A collection of a space that is known. Raises `RefusalError`."""
        collection: Readable = Follower(folder, every=None) if self.follows else Collection(folder)
        if collection.space_id not in self._spaces:
            collection.close()
            raise RefusalError(
                f"{folder} holds vectors of space {collection.space_id}, this server's encoders make "
                f"{', '.join(self._spaces)} (MODEL_INDEX_MISMATCH): give the bundle that it was built with as --bundle or "
                "among --other-bundles, or build it again"
            )
        return collection

    def place(self, name: str, release: str) -> Path:
        """Where a collection of a release lies. Raises `RefusalError` where no folder of releases is known."""
        if not release:
            return self._folder / name
        if self._releases is None:
            raise RefusalError(
                f"the collection {name!r} is served from the release {release!r}: give the folder of releases with "
                "--releases"
            )
        return self._releases / release / name

    def served(self, name: str) -> Served:
        """What a name stands for. Raises `NotFoundError`."""
        with self._lock:
            served = self._served.get(name)
            if served is None:
                known = ", ".join(sorted(self._served)[:10]) or "none"
                raise NotFoundError(f"there is no collection {name!r} (known: {known})", "collection", name)
            return served

    def get(self, name: str) -> Readable:
        """A collection by name. Raises `NotFoundError`."""
        return self.served(name).collection

    def all_served(self) -> list[Served]:
        """What every name stands for, by name."""
        with self._lock:
            return [self._served[name] for name in sorted(self._served)]

    def all(self) -> list[Readable]:
        """Every collection, by name."""
        return [served.collection for served in self.all_served()]

    def pointer(self, name: str) -> Pointer:
        """Which release a name stands for."""
        return self._pointers.get(name, Pointer(live=""))

    def point(self, name: str, pointer: Pointer, served: Served | None = None) -> None:
        """From here on a name stands for `served`, of the release that the pointer says: on the disk, then in memory."""
        root = self._changeable()
        with self._changing:
            pointers = {**self._pointers, name: pointer}
            if pointer == Pointer(live=""):
                del pointers[name]
            self._write(root, pointers)
            if served is not None:
                with self._lock:
                    self._served[name] = served

    def create(
        self, name: str, space_id: str, dim: int, *, keep_originals: bool = False, thumbnail_pixels: int = 0
    ) -> Collection:
        """Make an empty collection."""
        if not NAME.fullmatch(name):
            raise InvalidArgumentError(f"{name!r} cannot be a collection's name: {NAME_RULE}", "BAD_NAME", "name")
        if thumbnail_pixels and thumbnail_pixels not in THUMBNAIL_PIXELS:
            raise InvalidArgumentError(
                f"thumbnail_pixels is {thumbnail_pixels}, {THUMBNAIL_PIXELS[0]} to {THUMBNAIL_PIXELS[-1]} are allowed (0: "
                "none)", "BAD_THUMBNAIL_PIXELS", "thumbnail_pixels",
            )  # fmt: skip
        root = self._changeable()
        with self._changing:
            if name in self._served:
                raise AlreadyExistsError(f"the collection {name!r} exists already", collection=name)
            try:
                collection = Collection.create(
                    root / name, space_id, dim, keep_originals=keep_originals, thumbnail_pixels=thumbnail_pixels
                )
            except RefusalError as e:
                raise PreconditionError(str(e), "FOLDER_IN_USE", collection=name) from e
            with self._lock:
                self._served[name] = Served(collection)
            return collection

    def delete(self, name: str) -> None:
        """Delete a collection, for good. Calls on it that are under way finish first; later ones are NOT_FOUND."""
        root = self._changeable()
        with self._changing:
            collection = self.get(name)
            with self._lock:
                del self._served[name]
            collection.close()
            # What it was before it was served from a release would be served again at the next start: it goes first.
            gone = [self._set_aside(root / name)] if (root / name).is_dir() else []
            if name in self._pointers:
                self._write(root, {n: pointer for n, pointer in self._pointers.items() if n != name})
                if collection.folder.is_dir():
                    gone.append(self._set_aside(collection.folder))
        for folder in gone:
            shutil.rmtree(folder)

    def close(self) -> None:
        """Close every collection."""
        for served in self._served.values():
            served.collection.close()

    @staticmethod
    def _set_aside(folder: Path) -> Path:
        gone = folder.parent / f".deleted-{folder.name}-{uuid.uuid4().hex}"
        folder.rename(gone)
        sync_folder(folder.parent)
        return gone

    def _write(self, root: Path, pointers: dict[str, Pointer]) -> None:
        """Under the lock of changes."""
        write_file(root / POINTERS, Pointers(collections=pointers).sealed().model_dump_json(indent=2))
        self._pointers = pointers

    def _changeable(self) -> Path:
        if self.follows:
            raise read_only()
        if self._root is None:
            raise PreconditionError(
                "this server was started on a single collection, so it cannot make, exchange or delete any: start it with "
                "--collections on the folder above",
                "COLLECTIONS_FIXED",
            )
        return self._root
