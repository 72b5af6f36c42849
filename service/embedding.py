"""Pictures → shards of vectors in a work folder: resumable, checked, and never in memory together.

    building/
        <digest>.arrow    a row per picture that could be embedded: position in the shard, sha256, vector, thumbnail
        <digest>.json     the note that makes it valid: its checksum, and what could not be read
        tried.json        what could not be read in shards that are stored elsewhere by now

The digest is that of the shard's listing, so that shards are found again when those before them are gone.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from export.bundle import Embeddings, make_folder, publish, sha256_file, sha256_json, write_file
from export.preprocess import DEFAULT_LIMITS, DecodeLimits, UnreadablePictureError
from export.sources.picture import Picture, SourcePicture
from service.encoder import BUILD_BATCH, Decoded, Encoded, Encoder
from service.index import Rows
from service.records import MAX_KEY_BYTES

# Pictures per shard: the unit of work that is lost at most, twice, when a build is killed.
SHARD = 512
# Remote pictures that are fetched at a time.
FETCHED = 16
# Encoded remote pictures that are in memory, or on their way there, before they are decoded.
AHEAD = 64
# Seconds between lines of progress where there is no terminal to draw a bar on.
SAID_EVERY = 60.0
NOTE = 4  # format of a shard's files
_Decoding = deque[Future[Decoded | UnreadablePictureError]]
_TRIED = "tried.json"


class Unread(NamedTuple):
    """A picture that could not be embedded, as it was listed."""

    key: str
    size: int
    mtime_ns: int
    reason: str
    was_read: bool
    """Whether its bytes could be had, and are no picture."""

    @property
    def listed(self) -> tuple[str, int, int]:
        """Key, size and time."""
        return self[:3]


class Shard(NamedTuple):
    """A finished shard: N pictures that were embedded, and those that could not be. Columns and vectors are mapped from the
    disk."""

    name: str
    positions: Rows
    """int64 [N]: which of the given pictures they are."""
    sha256: pa.Array
    """string [N]: of the encoded pictures, hexadecimal."""
    thumbnails: pa.Array
    """binary [N]: JPEG; null where none was asked for."""
    vectors: Embeddings
    """float32 [N, D], unit rows."""
    unreadable: list[Unread]
    """The others."""
    animated: int
    """Pictures of which the first frame was used."""


class _Fetched:
    """A remote picture that is fetched ahead of its turn: `AHEAD` of them are, and each that is taken lets another come."""

    def __init__(self, picture: SourcePicture, line: _Line) -> None:
        self._picture, self._line = picture, line
        self._data: Future[bytes] | None = None

    def start(self, pool: ThreadPoolExecutor, limits: DecodeLimits) -> None:
        """Begin to fetch it."""
        self._data = pool.submit(self._picture.read, limits)

    def read(self, limits: DecodeLimits = DEFAULT_LIMITS) -> bytes:
        """Its bytes, once they are here."""
        data = self._line.take(self)
        self._data = None  # they go with whoever decodes them
        return data.result()


class _Line:
    """Remote pictures in the order in which they are needed. Thread-safe."""

    def __init__(self, pool: ThreadPoolExecutor, limits: DecodeLimits) -> None:
        self._pool, self._limits = pool, limits
        self._waiting: deque[_Fetched] = deque()
        self._ahead = 0
        self._lock = threading.Lock()

    def join(self, fetched: _Fetched) -> None:
        """Fetch it when its turn comes."""
        with self._lock:
            self._waiting.append(fetched)
            self._advance()

    def take(self, fetched: _Fetched) -> Future[bytes]:
        """What comes of one, which is fetched at once where its turn has not come."""
        with self._lock:
            if fetched._data is None:
                self._waiting.remove(fetched)
                fetched.start(self._pool, self._limits)
            else:
                self._ahead -= 1
                self._advance()
            assert fetched._data is not None
            return fetched._data

    def _advance(self) -> None:
        while self._waiting and self._ahead < AHEAD:
            self._waiting.popleft().start(self._pool, self._limits)
            self._ahead += 1


class _Note(NamedTuple):
    """What is said of a shard beside its columns."""

    sha256: str
    unreadable: list[Unread]
    animated: int


class Embedder:
    """Embeds pictures shard by shard in a work folder of its own, and continues there after a kill."""

    def __init__(self, work: Path, encoder: Encoder, console: Console, thumbnail: int | None = None) -> None:
        """`thumbnail`: pixels of the longer side of one to be made of each picture."""
        make_folder(work)
        self._work, self._encoder, self._console, self._thumbnail = work, encoder, console, thumbnail
        self._recipe = sha256_json([NOTE, encoder.space_id, encoder.origin, encoder.limits.model_dump(), thumbnail])
        self.tried = self._read_tried()
        """What could not be read in shards that were stored, by this start or an earlier one: `shards` leaves it out."""

    def shards(self, pictures: Sequence[Picture]) -> Generator[Shard, None, None]:
        """Embed pictures with unique keys: a finished shard at a time, in their order; none of it is kept here. Those of
        `tried` are left out. The next shard is decoded while one is embedded.

        Whoever stops before the end closes the iterator (`contextlib.closing`).
        """
        tried = {unread.listed: unread for unread in self.tried}
        again = {i for i, p in enumerate(pictures) if _listed(p) in tried} if tried else set()
        self.tried = [tried[_listed(pictures[i])] for i in sorted(again)]
        at = np.array([i for i in range(len(pictures)) if i not in again], np.int64)
        parts = [at[low : low + SHARD] for low in range(0, len(at), SHARD)]
        names = [self._name([pictures[i] for i in part]) for part in parts]
        self._remove_others(set(names))
        with _progress(self._console, len(at)) as advance, self._fetching():
            note = self._note(names[0]) if names else None
            ahead: _Decoding | None = None
            for number, (name, part) in enumerate(zip(names, parts, strict=True)):
                following = number + 1 if number + 1 < len(names) else None
                next_note = None if following is None else self._note(names[following])
                found = note is not None
                if note is None:
                    mine = [pictures[i] for i in part]
                    decoding = self._decoding(mine) if ahead is None else ahead
                    ahead = None
                    if following is not None and next_note is None:
                        ahead = self._decoding([pictures[i] for i in parts[following]])
                    note = self._embedded(name, mine, decoding)
                advance(len(part), found)
                yield self._shard(name, part, note)
                note = next_note

    @contextmanager
    def _fetching(self) -> Iterator[None]:
        """Remote pictures are fetched inside; what is not here yet when it is left is given up."""
        self._fetchers = ThreadPoolExecutor(FETCHED, thread_name_prefix="fetch")  # a thread starts when it is needed
        self._line = _Line(self._fetchers, self._encoder.limits)
        try:
            yield
        finally:
            self._fetchers.shutdown(wait=False, cancel_futures=True)

    def stored(self, shards: Sequence[Shard]) -> None:
        """What the shards hold is durable elsewhere: their files go, and what could not be read is not tried again before
        `remove`."""
        self.tried += [unread for shard in shards for unread in shard.unreadable]
        write_file(self._work / _TRIED, json.dumps({"recipe": self._recipe, "unreadable": self.tried}))
        for shard in shards:
            for path in self._files(shard.name):
                path.unlink()

    def remove(self) -> None:
        """Remove the work folder: everything is stored elsewhere."""
        shutil.rmtree(self._work)

    def _files(self, name: str) -> tuple[Path, Path]:
        return self._work / f"{name}.arrow", self._work / f"{name}.json"

    def _name(self, part: Sequence[Picture]) -> str:
        """What a shard is made of, as a digest."""
        return sha256_json([self._recipe, [_listed(picture) for picture in part]])[:32]

    def _remove_others(self, names: set[str]) -> None:
        """What an earlier start left and this one does not need: other pictures, or stored already."""
        for path in self._work.iterdir():
            if path.stem not in names and path.suffix in (".arrow", ".json", ".tmp", ".npy") and path.name != _TRIED:
                path.unlink()

    def _read_tried(self) -> list[Unread]:
        try:
            stored = json.loads((self._work / _TRIED).read_bytes())
            return [Unread(*row) for row in stored["unreadable"]] if stored["recipe"] == self._recipe else []
        except (OSError, ValueError, KeyError, TypeError):
            return []  # absent or damaged: tried again

    def _note(self, name: str) -> _Note | None:
        """The note of a shard as an earlier start left it; None where it is absent, or its file was damaged."""
        columns, note_file = self._files(name)
        try:
            found = json.loads(note_file.read_bytes())
            note = _Note(found["sha256"], [Unread(*row) for row in found["unreadable"]], found["animated"])
            return note if note.sha256 == sha256_file(columns) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _decoding(self, part: Sequence[Picture]) -> _Decoding:
        return deque(self._encoder.decoders.submit(self._read, picture.key, self._fetched(picture)) for picture in part)

    def _fetched(self, picture: Picture) -> Encoded:
        """A picture whose bytes are local, or are being fetched: many at a time, for the network answers late."""
        if not (isinstance(picture, SourcePicture) and picture.is_remote):
            return picture
        fetched = _Fetched(picture, self._line)
        self._line.join(fetched)
        return fetched

    def _read(self, key: str, picture: Encoded) -> Decoded | UnreadablePictureError:
        try:
            size = len(key.encode())
        except UnicodeEncodeError:
            return UnreadablePictureError("IMAGE_UNDECODABLE", "its key is no Unicode text: write it as UTF-8")
        if size > MAX_KEY_BYTES:
            return UnreadablePictureError(
                "IMAGE_UNDECODABLE", f"its key has more than {MAX_KEY_BYTES} bytes: shorten folder or file names"
            )
        return self._encoder.read(picture, self._thumbnail)

    def _embedded(self, name: str, part: Sequence[Picture], decoding: _Decoding) -> _Note:
        """Embed one shard, and write its files."""
        positions, digests, thumbnails, pixels = [], [], [], []
        vectors: list[Embeddings] = []
        unreadable, animated = [], 0
        for position, picture in enumerate(part):
            result = decoding.popleft().result()  # pixels go as soon as they are embedded
            if isinstance(result, UnreadablePictureError):
                was_read = not isinstance(result.__cause__, OSError)
                unreadable.append(Unread(*_listed(picture), str(result), was_read))
                continue
            animated += result.animated
            positions.append(position)
            digests.append(result.sha256)
            thumbnails.append(result.thumbnail)
            pixels.append(result.pixels)
            if len(pixels) == BUILD_BATCH:
                vectors.append(self._encoder.embed(np.stack(pixels)))
                pixels = []
        if pixels:
            vectors.append(self._encoder.embed(np.stack(pixels)))
        matrix = np.concatenate(vectors) if vectors else np.zeros((0, self._encoder.dim), np.float32)
        columns, note_file = self._files(name)
        temporary = columns.with_suffix(".tmp")
        table = pa.table({
            "position": pa.array(positions, pa.int64()), "sha256": pa.array(digests, pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), self._encoder.dim),
            "thumbnail": pa.array(thumbnails, pa.binary()),
        })  # fmt: skip
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        publish(temporary, columns)
        note = _Note(sha256_file(columns), unreadable, animated)
        write_file(note_file, json.dumps(note._asdict()))
        return note

    def _shard(self, name: str, part: Rows, note: _Note) -> Shard:
        # Closing the file leaves the mapping to what was read from it, and takes no descriptor per shard.
        with pa.memory_map(str(self._files(name)[0])) as source:
            table = pa.ipc.open_file(source).read_all()
        empty = not len(table)
        position, sha256, vector, thumbnail = (
            pa.array([], column.type) if empty else column.chunk(0) for column in table.columns
        )
        vectors: Embeddings = vector.flatten().to_numpy().reshape(-1, self._encoder.dim)
        return Shard(name, part[position.to_numpy()], sha256, thumbnail, vectors, note.unreadable, note.animated)


def _listed(picture: Picture) -> tuple[str, int, int]:
    return picture.key, picture.size, picture.mtime_ns


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int, bool], None]]:
    """Call with the pictures of each shard, and whether they had been embedded before: a bar with the time that is left on
    a terminal, elsewhere a line a minute."""
    done, begun = 0, time.monotonic()
    made, said = 0, begun
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)

        def advance(count: int, found: bool) -> None:
            nonlocal done, begun, made, said
            done += count
            now = time.monotonic()
            if found:  # which says nothing of what is left
                bar.reset(task, total=total, completed=done)
                begun = now if not made else begun
                return
            bar.update(task, completed=done)
            made += count
            if bar.disable and now - said >= SAID_EVERY and done < total:
                left = timedelta(seconds=round((total - done) * (now - begun) / made))
                console.print(f"{done:,} of {total:,} pictures embedded, {made / (now - begun):,.1f}/s, {left} left")
                said = now

        yield advance
