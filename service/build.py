"""`likewise index build` and `sync`: pictures → a collection, resumable shard by shard.

Shards of pictures are embedded in a work folder; groups of them become segments, in one commit each. Neither vectors nor
rows of more than a group are ever in memory. Killed at any point, the same command continues; run again later, it adds what
is new or changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
from rich.console import Console

from export.bundle import Bundle, RefusalError, printable, write_unreadable
from export.shipped import bundle_flag
from export.sources.picture import Picture
from service.changes import Changes, compare
from service.collection import Collection
from service.config import IndexBuild, IndexSync
from service.embedding import Embedder, Shard
from service.encoder import Encoder
from service.fields import Fields
from service.found import Found, fields_of, find, table_of
from service.gpu_index import keep_to_cpu
from service.records import FileState, NewRow
from service.store import NAME, NAME_RULE

# Shards are joined into segments of about so many rows.
GROUP = 1_000_000
# Rows that are moved in one commit.
_MOVED = 512
_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("payload", pa.string()),
        ("source_uri", pa.string()),
        ("file_size", pa.int64()),
        ("file_mtime_ns", pa.int64()),
    ]
)


def build(asked: IndexBuild) -> None:
    """Build a collection, or add what is new or changed. Raises `RefusalError`."""
    _follow(asked, None)


def sync(asked: IndexSync) -> None:
    """Make a collection follow a folder, deletions included. Raises `RefusalError`."""
    _follow(asked, asked)


def _follow(asked: IndexBuild, following: IndexSync | None) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    if asked.device == "cpu":
        keep_to_cpu()
    if not NAME.fullmatch(asked.out.name):
        raise RefusalError(f"{asked.out.name!r} cannot be a collection's name: {NAME_RULE}; choose another --out")
    is_there = (asked.out / "collection.json").is_file()
    bundle = Bundle.open(asked.bundle)
    found = find(asked, following is not None, is_there)
    table = table_of(asked, found)
    if following is not None and following.dry_run and not is_there:
        console.print(f"{len(found.pictures):,} pictures to embed into a new collection; nothing was done (--dry-run)")
        return
    collection = _opened(asked, bundle, is_there)
    try:
        before = collection.files()
        changes = compare(before, found.pictures, found.folder, [key for key, _ in found.unreadable])
        if following is None:
            changes = _without_renaming(changes)
        _announce(changes, found, following is not None, console)
        run = _Run(asked, bundle, collection, console, found, table, before)
        most = None if following is None else _most_deletions(following, changes, before, found)
        if following is not None and following.dry_run:
            _say(changes, console)
            return
        # What comes before what goes: interrupted in between, nothing is missing.
        done = run.embed(changes.embed)
        collection.touch((p.key, p.mtime_ns) for p in changes.touched)
        run.move(changes.moved)
        run.describe()
        deleted = 0 if most is None else run.delete(changes, done.undecodable, most)
        if collection.flush_due or collection.merge_due:
            console.print("merging segments")
            collection.maintain()
        console.print(
            f"done: {asked.out} holds {len(collection):,} items ({done.written:,} written now, {done.unreadable} skipped"
            f"{f', {deleted:,} deleted' if following is not None else ''})   "
            f"next: likewise serve{bundle_flag(asked.bundle)} --collections {asked.out}"
        )
    finally:
        collection.close()


def _opened(asked: IndexBuild, bundle: Bundle, is_there: bool) -> Collection:
    if not is_there:
        return Collection.create(
            asked.out, bundle.space_id, bundle.dim, asked.policy(), keep_originals=asked.keep_originals,
            thumbnail_pixels=asked.thumbnails or 0,
        )  # fmt: skip
    collection = Collection(asked.out, bundle.space_id)
    try:
        asked.check(collection.manifest.policy, asked.out)
    except RefusalError:
        collection.close()
        raise
    return collection


def _without_renaming(changes: Changes) -> Changes:
    """Where nothing goes, what was renamed is there twice."""
    renamed = [p for old, p in changes.moved if old != p.key]
    kept = [(old, p) for old, p in changes.moved if old == p.key]
    return changes._replace(embed=sorted([*changes.embed, *renamed], key=lambda p: p.key), moved=kept)


def _most_deletions(following: IndexSync, changes: Changes, before: Mapping[str, FileState], found: Found) -> float:
    """How many items may go. Raises `RefusalError` where more would."""
    most = following.max_delete * sum(state.size is not None for state in before.values())
    if len(changes.gone) + len(changes.replaced) > most:
        raise RefusalError(
            f"{len(changes.gone):,} items have no file in {found.name} (any more), and {len(changes.replaced):,} of "
            f"files elsewhere would be replaced, of {len(before):,}: more than --max-delete "
            f"{following.max_delete:g} allows; nothing was done. Check that the folder is the right one and is mounted, "
            "or pass --max-delete 1"
        )
    return most


def _announce(changes: Changes, found: Found, deletes: bool, console: Console) -> None:
    """What was found, in one line, and what is left alone."""
    count = len(found.pictures)
    unchanged = count - sum(len(part) for part in (changes.embed, changes.touched, changes.moved, changes.owned))
    gone = f"; {len(changes.gone):,} items have no file in {found.name} (any more)" if changes.gone else ""
    moved = "under a new name" if found.folder is not None else "at a new place"
    console.print(
        f"{count:,} pictures: {unchanged:,} as they were, {len(changes.embed):,} to embed, {len(changes.touched):,} with a "
        f"new time only, {len(changes.moved):,} {moved}{gone}{' and stay' if gone and not deletes else ''}"
    )
    if changes.owned:
        console.print(f"{len(changes.owned):,} files are left alone, a client wrote their item: {changes.owned[0]}, …")


def _say(changes: Changes, console: Console) -> None:
    """What would be done."""
    renamed = [f"{old} → {picture.key}" for old, picture in changes.moved]
    for what, keys in (("embed", [p.key for p in changes.embed]), ("rename", renamed), ("delete", changes.gone)):
        for key in keys[:20]:
            console.print(f"would {what} {printable(key)}")
        if len(keys) > 20:
            console.print(f"would {what} {len(keys) - 20:,} more")
    console.print("nothing was done (--dry-run)")


class _Embedded(NamedTuple):
    """What became of the pictures that were to be embedded."""

    written: int
    unreadable: int
    undecodable: list[str]
    """Keys of those whose bytes were read and are no picture."""


@dataclass
class _Run:
    """A collection that is being brought up to its pictures, one step after another."""

    asked: IndexBuild
    bundle: Bundle
    collection: Collection
    console: Console
    found: Found
    table: Fields | None
    before: Mapping[str, FileState]

    def embed(self, todo: Sequence[Picture]) -> _Embedded:
        """Embed pictures, group by group, into segments of their own; list those that cannot be."""
        work, unread = self.asked.out / "building", self.found.unreadable
        if not todo:
            shutil.rmtree(work, ignore_errors=True)  # of a build whose pictures are gone
            write_unreadable(self.asked.out / "unreadable.tsv", unread)
            return _Embedded(0, len(unread), [])
        encoder = Encoder(self.bundle, self.asked, self.console.print)
        try:
            refusal = encoder.mixing_refusal(self.collection.origins)
            if refusal is not None:
                raise RefusalError(refusal)
            self.console.print(
                f"embedding with {self.bundle.space_id}, {encoder.runtime.variant} on {encoder.runtime.provider} "
                f"({encoder.runtime.provider_reason})"
            )
            embedder = Embedder(work, encoder, self.console, self._thumbnail())
            written, animated = self._in_groups(embedder, todo, encoder.origin)
        finally:
            encoder.close()
        unreadable = [*unread, *((unread.key, unread.reason) for unread in embedder.tried)]
        write_unreadable(self.asked.out / "unreadable.tsv", unreadable)
        embedder.remove()
        for key, reason in unreadable[:5]:
            self.console.print(f"skipped {printable(key)}: {reason}")
        if len(unreadable) > 5:
            self.console.print(f"… and {len(unreadable) - 5} more: see {self.asked.out / 'unreadable.tsv'}")
        if animated:
            self.console.print(f"{animated} pictures are animated: their first frame was used")
        return _Embedded(written, len(unreadable), [unread.key for unread in embedder.tried if unread.was_read])

    def _in_groups(self, embedder: Embedder, todo: Sequence[Picture], origin: str) -> tuple[int, int]:
        """How many rows were written, and how many pictures are animated."""
        written = animated = 0
        group: list[tuple[pa.Table, Shard]] = []

        def store() -> None:
            nonlocal written
            rows = pa.concat_tables([rows for rows, _ in group])
            if len(rows):
                self.console.print(f"writing a segment of {len(rows):,} vectors of {self.bundle.dim} dimensions")
                self.collection.add_table(rows, [shard.vectors for _, shard in group], origin)
            # Killed before this, they are in the collection, and nothing looks for their shards any more.
            embedder.stored([shard for _, shard in group])
            written += len(rows)
            group.clear()

        with closing(embedder.shards(todo)) as shards:
            for shard in shards:
                group.append((self._rows(shard, todo), shard))
                animated += shard.animated
                if sum(len(rows) for rows, _ in group) >= GROUP:
                    store()
        if group:
            store()
        return written, animated

    def _rows(self, shard: Shard, todo: Sequence[Picture]) -> pa.Table:
        """The rows of a shard, named as the fields of `NewRow`."""
        rows = [self._row(todo[i], self._known(todo[i].key)) for i in shard.positions]
        columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in _COLUMNS]
        table = pa.Table.from_arrays(columns, schema=_COLUMNS)
        return table.append_column("file_sha256", shard.sha256).append_column("thumbnail", shard.thumbnails)

    def _row(self, picture: Picture, known: Mapping[str, Any]) -> NewRow:
        """A row without what only its bytes tell. `known`: what stays of its payload where nobody says another."""
        payload: dict[str, Any] = {"folder": picture.folder}
        if self._is_described(picture):
            payload |= json.loads(fields_of(picture) or "{}") | json.loads((self.table or {}).get(picture.key, "{}"))
        else:
            payload |= known
        return NewRow(
            key=picture.key, payload=json.dumps(payload), source_uri=picture.uri, file_size=picture.size,
            file_mtime_ns=picture.mtime_ns,
        )  # fmt: skip

    def _is_described(self, picture: Picture) -> bool:
        """Whether a table or its list says what the payload is."""
        return self.table is not None or bool(fields_of(picture))

    def _known(self, key: str) -> dict[str, Any]:
        """The payload of an item that is there, without what follows from its file."""
        if key not in self.before:
            return {}
        payload: dict[str, Any] = json.loads(self.collection.get(key).row.payload)
        payload.pop("folder", None)
        return payload

    def _thumbnail(self) -> int | None:
        """Pixels of the thumbnails to be made."""
        asked, kept = self.asked.thumbnails, self.collection.manifest.thumbnail_pixels
        return (kept if asked is None else asked) or None

    def move(self, moves: Sequence[tuple[str, Picture]]) -> None:
        """Give items other names or places; their vectors stay."""
        for low in range(0, len(moves), _MOVED):
            self._move(
                [
                    (old, self._row(picture, self._known(old))._replace(file_sha256=self.before[old].sha256))
                    for old, picture in moves[low : low + _MOVED]
                ]
            )

    def describe(self) -> None:
        """Give items that were there the payload that a table or list says now, without embedding them again."""
        pictures = {
            p.key: p
            for p in self.found.pictures
            if self._is_described(p) and p.key in self.before and self.before[p.key].size is not None
        }
        if not pictures:
            return
        described = 0
        for rows, _ in self.collection.scan():
            other: list[NewRow] = []
            columns = (rows[name].to_pylist() for name in ("key", "source_uri", "payload"))
            for key, uri, payload in zip(*columns, strict=True):
                if key in pictures:
                    said = self._row(pictures[key], {}).payload
                    if json.loads(said) != json.loads(payload):
                        other.append(NewRow(key, said, uri))
            self._renew(other)
            described += len(other)
        if described or self.table is not None:
            self.console.print(f"{described:,} items that were there have another payload now")

    def _renew(self, rows: Sequence[NewRow]) -> None:
        """Write rows whose payload alone is another: its file may have other bytes by now that could not be read."""
        for low in range(0, len(rows), _MOVED):
            part = rows[low : low + _MOVED]
            made = self.collection.made([row.key for row in part])
            self._move([(row.key, row._replace(**made[row.key]._asdict())) for row in part])

    def _move(self, moves: Sequence[tuple[str, NewRow]]) -> None:
        """However many come, few are in memory."""
        self.collection.move(moves)
        if self.collection.flush_due:
            self.collection.flush()

    def delete(self, changes: Changes, undecodable: Sequence[str], most: float) -> int:
        """Delete items whose file is gone, or is no picture any more: how many."""
        broken = [key for key in undecodable if key in self.before]
        if len(changes.gone) + len(changes.replaced) + len(broken) > most:
            self.console.print(f"{len(broken):,} items whose file is no picture any more stay: see --max-delete")
            broken = []
        self.collection.delete([*changes.gone, *broken])
        return len(changes.gone) + len(broken)
