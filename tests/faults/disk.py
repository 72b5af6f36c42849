"""A disk that loses power: what may be found on it afterwards.

Stricter than the file systems in use (Pillai et al. 2014, "All file systems are not created equal"), so that what survives
here needs no favour of theirs:

- What a file held at its last fsync or fdatasync is there. Each write since then is there, is not, or is there in part: by
  sectors of 512 bytes, each for itself, in any order. Where a file grew, sectors that were lost may read as zeros or as
  noise. Changes of size (truncation) come in order, and what was written after one is there only if it is.
- A name (made, renamed or removed) is there for certain after an fsync of its folder, and of no other; that of the file
  itself does not count. Of the changes of a folder since then the first so many are there. Folders lose independently of
  each other and of the files in them: a name may be there while its file is empty.
- A rename within a folder is there whole or not at all.

So a synced file in a folder that was not synced is lost, and so is everything in a folder whose own name is. SQLite's
*-shm is shared memory that the first opening makes anew: it is gone, empty, or zeros. Not modelled: changes of one folder
out of their order, a sector that is torn, a rename from one folder to another, and disks that lie about fsync.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import NamedTuple

SECTOR = 512
SHARED_MEMORY = "-shm"
_FATES = ("lost", "kept", "first", "some")

Tree = dict[str, bytes | None]
"""Contents of each file by its path below the root; None: a folder."""


class Write(NamedTuple):
    """Bytes at an offset."""

    at: int
    data: bytes


def _put(contents: bytearray, change: Write | int) -> None:
    """Apply a write, or a new size."""
    if isinstance(change, int):
        del contents[change:]
        contents.extend(bytes(change - len(contents)))
    else:
        contents.extend(bytes(max(0, change.at - len(contents))))
        contents[change.at : change.at + len(change.data)] = change.data


def _sectors(write: Write) -> Iterator[Write]:
    """A write cut where sectors of the file end."""
    start, end = write.at, write.at + len(write.data)
    while start < end:
        stop = min(end, (start // SECTOR + 1) * SECTOR)
        yield Write(start, write.data[start - write.at : stop - write.at])
        start = stop


class File:
    """A file, apart from its names."""

    def __init__(self, contents: bytes = b"") -> None:
        self.durable = bytearray(contents)
        self.live = bytearray(contents)
        self.pending: list[Write | int] = []

    def change(self, change: Write | int) -> None:
        """Write, or set the size."""
        _put(self.live, change)
        self.pending.append(change)

    def sync(self, changes: int) -> None:
        """fsync, which began after so many of the pending changes."""
        for change in self.pending[:changes]:
            _put(self.durable, change)
        del self.pending[:changes]

    def after_power_loss(self, rng: random.Random, fate: str) -> bytes:
        """What it may hold."""
        contents = bytearray(self.durable)
        if fate == "kept":
            return bytes(self.live)
        if fate == "first" and self.pending:
            whole = rng.randrange(len(self.pending))
            for change in self.pending[:whole]:
                _put(contents, change)
            torn = self.pending[whole]
            if isinstance(torn, Write):
                sectors = list(_sectors(torn))
                for sector in sectors[: rng.randint(0, len(sectors))]:
                    _put(contents, sector)
        elif fate == "some":
            sizes = rng.randint(0, sum(isinstance(change, int) for change in self.pending))
            share, filler = rng.random(), rng.choice(("nothing", "zeros", "noise"))
            for change in self.pending:
                if isinstance(change, int):
                    if not sizes:
                        break
                    sizes -= 1
                    _put(contents, change)
                    continue
                for sector in _sectors(change):
                    if rng.random() < share:
                        _put(contents, sector)
                    elif filler != "nothing" and sector.at >= len(contents):
                        size = len(sector.data)
                        _put(contents, Write(sector.at, bytes(size) if filler == "zeros" else rng.randbytes(size)))
        return bytes(contents)


class Folder:
    """A folder, apart from its names."""

    def __init__(self, names: Mapping[str, Node] | None = None) -> None:
        self.durable: dict[str, Node] = dict(names or {})
        self.live = dict(self.durable)
        self.pending: list[dict[str, Node | None]] = []

    def change(self, names: dict[str, Node | None]) -> None:
        """Names that come or go (None) at once."""
        _name(self.live, names)
        self.pending.append(names)

    def sync(self, changes: int) -> None:
        """fsync, which began after so many of the pending changes."""
        for names in self.pending[:changes]:
            _name(self.durable, names)
        del self.pending[:changes]

    def after_power_loss(self, rng: random.Random, fate: str) -> dict[str, Node]:
        """The names that may be there."""
        count = {"lost": 0, "kept": len(self.pending)}.get(fate, rng.randint(0, len(self.pending)))
        names = dict(self.durable)
        for change in self.pending[:count]:
            _name(names, change)
        return names


Node = File | Folder


def _name(names: dict[str, Node], change: Mapping[str, Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def disk_of(tree: Tree) -> Folder:
    """A disk that holds a tree durably."""
    root = Folder()
    for path, contents in sorted(tree.items()):  # a folder comes before what is in it
        *parents, name = path.split("/")
        folder = root
        for parent in parents:
            node = folder.live[parent]
            assert isinstance(node, Folder)
            folder = node
        folder.change({name: Folder() if contents is None else File(contents)})
        folder.sync(1)
    return root


def tree_of(folder: Folder, prefix: str = "") -> Tree:
    """What processes see as long as the power is on."""
    tree: Tree = {}
    for name, node in folder.live.items():
        if isinstance(node, File):
            tree[prefix + name] = bytes(node.live)
        else:
            tree |= {prefix + name: None, **tree_of(node, f"{prefix}{name}/")}
    return tree


def lose_power(root: Folder, rng: random.Random) -> Tree:
    """What the disk may hold afterwards. A third of the losses takes all that may be taken, the others take at random."""
    worst = rng.random() < 1 / 3

    def fate() -> str:
        return "lost" if worst else rng.choice(_FATES)

    def walk(folder: Folder, prefix: str) -> Tree:
        tree: Tree = {}
        for name, node in sorted(folder.after_power_loss(rng, fate()).items()):
            if isinstance(node, Folder):
                tree |= {prefix + name: None, **walk(node, f"{prefix}{name}/")}
            elif not name.endswith(SHARED_MEMORY):
                tree[prefix + name] = node.after_power_loss(rng, fate())
            elif rng.random() < 0.5:
                tree[prefix + name] = bytes(rng.choice((0, len(node.live))))
        return tree

    return walk(root, "")
