"""The collections of a server: a folder of them, or a single one."""

from __future__ import annotations

import re
import shutil
import threading
import uuid
from pathlib import Path

from export.bundle import RefusalError, make_folder, sync_folder
from service.collection import Collection
from service.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, PreconditionError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
THUMBNAIL_PIXELS = range(32, 1025)
NAME_RULE = "1 to 63 of a-z, 0-9, '-' and '_' are allowed, starting with a letter or digit"


class Store:
    """Opens every collection of a folder for one embedding space."""

    def __init__(self, folder: Path, space_id: str, dim: int) -> None:
        """`folder` is a collection, or holds collections (it is made where absent).

        Raises `RefusalError` when any of them cannot be served: a server that starts serves everything it was given.
        """
        self._space_id, self._dim = space_id, dim
        self._lock = threading.Lock()  # held for a moment only: the event loop takes it too
        self._changing = threading.Lock()  # held through creations and deletions
        self._collections: dict[str, Collection] = {}
        single = (folder / "collection.json").is_file()
        self._root = None if single else folder
        if not single:
            try:
                make_folder(folder)
            except OSError as e:
                raise RefusalError(
                    f"{folder} cannot be used for collections ({e.strerror}): choose another folder"
                ) from e
            for leftover in folder.glob(".deleted-*"):
                shutil.rmtree(leftover)
        folders = [folder] if single else sorted(p.parent for p in folder.glob("*/collection.json"))
        try:
            for path in folders:
                if not NAME.fullmatch(path.name):
                    raise RefusalError(f"{path} has a name that the API cannot carry: rename it; {NAME_RULE}")
                self._collections[path.name] = Collection(path, space_id)
        except RefusalError:
            self.close()
            raise

    def get(self, name: str) -> Collection:
        """A collection by name. Raises `NotFoundError`."""
        with self._lock:
            collection = self._collections.get(name)
            if collection is None:
                known = ", ".join(sorted(self._collections)[:10]) or "none"
                raise NotFoundError(f"there is no collection {name!r} (known: {known})", "collection", name)
            return collection

    def all(self) -> list[Collection]:
        """Every collection, by name."""
        with self._lock:
            return [self._collections[name] for name in sorted(self._collections)]

    def create(self, name: str, *, keep_originals: bool = False, thumbnail_pixels: int = 0) -> Collection:
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
            if name in self._collections:
                raise AlreadyExistsError(f"the collection {name!r} exists already", collection=name)
            try:
                collection = Collection.create(
                    root / name, self._space_id, self._dim, keep_originals=keep_originals,
                    thumbnail_pixels=thumbnail_pixels,
                )  # fmt: skip
            except RefusalError as e:
                raise PreconditionError(str(e), "FOLDER_IN_USE", collection=name) from e
            with self._lock:
                self._collections[name] = collection
            return collection

    def delete(self, name: str) -> None:
        """Delete a collection, for good. Calls on it that are under way finish first; later ones are NOT_FOUND."""
        root = self._changeable()
        with self._changing:
            collection = self.get(name)
            with self._lock:
                del self._collections[name]
            collection.close()
            gone = root / f".deleted-{name}-{uuid.uuid4().hex}"
            collection.folder.rename(gone)
            sync_folder(root)
        shutil.rmtree(gone)

    def close(self) -> None:
        """Close every collection."""
        for collection in self._collections.values():
            collection.close()

    def _changeable(self) -> Path:
        if self._root is None:
            raise PreconditionError(
                "this server was started on a single collection, so it cannot make or delete any: start it with "
                "--collections on the folder above",
                "COLLECTIONS_FIXED",
            )
        return self._root
