"""`likewise index reembed`: what a collection holds, embedded by another encoder, and kept up with its writes.

The old collection may be in use: its records are read as a follower reads them. Its writes are replayed in their order, a
shard of pictures at a time, and the new collection notes up to which write it has come; so a start after a kill, or after a
week, does what has not been done. A row that was replaced or deleted meanwhile is met at its new place among the writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console

from export.bundle import Bundle, Embeddings, RefusalError, printable, sha256_file, write_unreadable
from export.preprocess import DEFAULT_LIMITS, DecodeLimits, UnreadablePictureError, first_folder
from export.shipped import bundle_flag
from export.sources.picture import Picture, SourcePicture, picture_at
from service.collection import Collection
from service.config import Constraints, Embedding
from service.embedding import Embedder
from service.encoder import Encoder
from service.errors import DataLossError
from service.follower import Follower
from service.originals import MissingOriginalError, Originals, place_of
from service.reading import Readable
from service.records import NewRow, Written
from service.store import NAME, NAME_RULE

# Writes that are read of the old collection at a time, as of one moment.
ROUND = 65_536
# Rows that wait in the new collection's records for a segment of their own.
FLUSHED = 32_768
# Rows whose place is looked at before anything is embedded, at a time.
PAGE = 10_000
EXAMPLES = 3

WITHOUT = {
    "client_vectors": "came as vectors, without a picture",
    "bytes_not_kept": "came as bytes that were not kept (see --keep-originals)",
    "originals_gone": "have lost the original that was kept",
    "files_gone": "have no file any more",
    "files_changed": "have a file whose bytes changed since: sync the old collection first",
    "unreadable": "have a picture that cannot be read",
}
"""Why items cannot be embedded again, by a word for programs."""


class IndexReembed(Embedding, Constraints):
    """Embed what a collection holds with another bundle, into a collection of its own. The old one may be in use; run again,
    the new one catches up with what was written to it."""

    old: CliPositionalArg[Path]
    """The collection folder to read; a server may write to it meanwhile."""
    out: Path
    """The collection folder to write; its name is the collection's name."""
    leave_out: bool = False
    """Go on without the items that cannot be embedded again, and list them in unreadable.tsv."""
    trust_sources: bool = False
    """Read the source_uri of items that came as vectors or bytes, too: they are whatever clients have said."""
    lag: int = Field(0, ge=0)
    """Stop as soon as at most so many writes are left: a busy collection is never quite reached."""

    def cli_cmd(self) -> int:
        """Run the command."""
        reembed(self)
        return 0


class KeptPicture(NamedTuple):
    """An original, as embedding reads pictures."""

    key: str
    size: int
    originals: Originals
    digest: str

    @property
    def mtime_ns(self) -> int:
        """A number that follows from its bytes, as a time would."""
        return int(self.digest[:15], 16)

    @property
    def folder(self) -> str:
        """The first folder of its key, or ''."""
        return first_folder(self.key)

    @property
    def uri(self) -> str:
        """Where it lies."""
        return place_of(self.originals.folder, self.digest).as_uri()

    def read(self, limits: DecodeLimits = DEFAULT_LIMITS) -> bytes:
        """Its bytes, whatever their number: they were accepted before. Raises `UnreadablePictureError`."""
        try:
            return self.originals.read(self.digest)
        except (DataLossError, OSError) as e:
            raise UnreadablePictureError("IMAGE_UNDECODABLE", str(e)) from e


def source_of(written: Written, originals: Originals, trusted: bool = False) -> Picture | str:
    """The picture of a row, as far as can be told without reading it; or why there is none (a word of `WITHOUT`)."""
    row = written.row
    if written.is_kept:
        assert row.file_sha256 is not None
        try:
            size = place_of(originals.folder, row.file_sha256).stat().st_size
        except OSError:
            return "originals_gone"
        return KeptPicture(row.key, size, originals, row.file_sha256)
    if row.file_size is None and not (trusted and row.source_uri):
        return "client_vectors" if row.origin == "client" else "bytes_not_kept"
    try:
        picture = picture_at(row.source_uri, row.key)
    except RefusalError:
        return "files_gone"
    if isinstance(picture.where, Path):
        if not picture.mtime_ns and not picture.where.is_file():
            return "files_gone"
        if row.file_size not in (None, picture.size):
            return "files_changed"
    return picture


@dataclass
class Survey:
    """What is to be embedded, before it is."""

    there: Counter[str] = field(default_factory=Counter)
    """Items whose picture can be had, by where: files, remote, originals."""
    without: Counter[str] = field(default_factory=Counter)
    """The others, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Keys of the first of these, by reason."""
    again: list[Written] = field(default_factory=list)
    """Rows of earlier writes that the new collection lacks."""

    def sentence(self) -> str:
        """The reasons with counts and examples."""
        return "; ".join(
            f"{count:,} {WITHOUT[reason]} ({', '.join(map(printable, self.examples[reason]))}"
            f"{', …' if count > EXAMPLES else ''})"
            for reason, count in sorted(self.without.items())
        )


def survey(
    old: Readable,
    new: Collection | None = None,
    trusted: bool = False,
    meet: Callable[[Picture], None] = lambda _: None,
) -> Survey:
    """Look at the rows of `old` that `new` lacks; `meet` is called with the pictures that are there. Only files with another
    time than when they were embedded are read."""
    found = Survey()
    followed = 0 if new is None else new.followed
    for page in _pages(old):
        if new is not None:
            known = new.digests([each.row.key for each in page if each.sequence <= followed])
            page = [each for each in page if each.sequence > followed or each.row.key not in known]
            found.again += [each for each in page if each.sequence <= followed]
        for each in page:
            source = source_of(each, old.originals, trusted)
            if isinstance(source, SourcePicture) and has_changed(each.row, source):
                source = "files_changed"
            if isinstance(source, str):
                found.without[source] += 1
                if found.without[source] <= EXAMPLES:
                    found.examples.setdefault(source, []).append(each.row.key)
                continue
            remote = isinstance(source, SourcePicture) and isinstance(source.where, str)
            found.there["originals" if each.is_kept else "remote" if remote else "files"] += 1
            meet(source)
    return found


def has_changed(row: NewRow, picture: SourcePicture) -> bool:
    """Whether a local file has other bytes than when it was embedded; where its time is the same it has not."""
    if row.file_sha256 is None or isinstance(picture.where, str) or picture.offset is not None:
        return False
    if picture.mtime_ns == row.file_mtime_ns:
        return False
    try:
        return sha256_file(picture.where) != row.file_sha256
    except OSError:
        return False  # embedding it will say why


def _pages(old: Readable) -> Iterator[list[Written]]:
    at, last = 0, old.latest()
    while at < last:
        writes = old.writes(at, PAGE)
        yield writes.live
        at = writes.upto


class Reembedding:
    """Replays the writes of a collection into one of another encoder. For one thread.

    After `step` has come to the old collection's last write, both hold the same keys, payloads, sources and thumbnails, but
    for those in `left_out`.
    """

    def __init__(
        self, old: Readable, new: Collection, encoder: Encoder, console: Console, trusted: bool = False
    ) -> None:
        """Raises `RefusalError` where `new` does not follow `old`, or its vectors do not go with the encoder's."""
        check_lineage(old, new)
        refusal = encoder.mixing_refusal(new.origins)
        if refusal is not None:
            raise RefusalError(refusal)
        self.old, self.new = old, new
        self.left_out: dict[str, str] = {}
        """Why items that were met cannot be embedded, by key: a word of `WITHOUT`, and what more is known."""
        self.embedded = 0
        """Rows that were embedded."""
        self._left_at: dict[str, int] = {}
        """Sequence number of what was left out, by key."""
        self._encoder, self._trusted = encoder, trusted
        self._embedder = Embedder(new.folder / "building", encoder, console)

    @property
    def lag(self) -> int:
        """Writes of the old collection that the new one does not hold yet."""
        return self.old.latest() - self.new.followed

    def step(self, count: int | None = None) -> bool:
        """Replay about `count` of the next writes, or `ROUND`; whether these were all up to now."""
        writes = self.old.writes(self.new.followed, count or ROUND)
        self._forget(writes.gone)
        self.put(writes.live, follow=True)
        self.new.follow(writes.upto)
        return writes.upto == writes.last

    def put(self, rows: Sequence[Written], follow: bool = False) -> None:
        """Embed rows of the old collection, which are all that were written in their stretch (`follow`), or some."""
        embed: list[Written] = []
        pictures: list[Picture] = []
        known = self.new.digests([each.row.key for each in rows])
        same: list[Written] = []
        for each in rows:
            digest, has_file = each.row.file_sha256, each.row.file_size is not None
            if digest is not None and known.get(each.row.key) == (digest, has_file):
                same.append(each)  # the same bytes: what is new is said of them
                continue
            source = source_of(each, self.old.originals, self._trusted)
            if isinstance(source, str):
                self._leave_out(each, source)
            else:
                embed.append(each)
                pictures.append(source)
        self._move(same)
        with closing(self._embedder.shards(pictures)) as shards:
            for shard in shards:
                by_key = {unread.key: unread.reason for unread in shard.unreadable}
                mine = [embed[at] for at in shard.positions.tolist()]
                self._store(mine, shard.sha256.to_pylist(), shard.vectors)
                for each in embed if by_key else ():
                    if each.row.key in by_key:
                        self._leave_out(each, "unreadable", by_key[each.row.key])
                if follow and mine:  # everything before it is there
                    self.new.follow(mine[-1].sequence)

    def close(self) -> None:
        """Everything that was embedded is stored: the work folder goes."""
        self._embedder.remove()

    def _store(self, rows: Sequence[Written], digests: Sequence[str], vectors: Embeddings) -> None:
        """Write rows whose pictures had `digests`, with vectors [N, D], and their originals."""
        kept: list[int] = []
        for i, (each, digest) in enumerate(zip(rows, digests, strict=True)):
            if each.row.file_sha256 not in (None, digest):
                self._leave_out(each, "originals_gone" if each.is_kept else "files_changed")
            else:
                kept.append(i)
        while kept:
            names = {i: digests[i] for i in kept if rows[i].is_kept}
            new = [
                # Without a file a digest would stand for an original.
                row._replace(file_sha256=digests[i] if row.file_size is not None or i in names else None)
                for i, row in zip(kept, self._rows([rows[i] for i in kept]), strict=True)
            ]
            try:
                with self.new.originals.carried_over(self.old.originals, names.values()):
                    self.new.upsert(new, vectors[kept])
                break
            except MissingOriginalError:  # swept: its item was replaced or deleted meanwhile
                lost = [i for i in names if not place_of(self.old.originals.folder, digests[i]).exists()]
                for i in lost:
                    self._leave_out(rows[i], "originals_gone")
                kept = [i for i in kept if i not in lost]
        self.embedded += len(kept)
        self._stored([rows[i] for i in kept])

    def _move(self, rows: Sequence[Written]) -> None:
        for low in range(0, len(rows), PAGE):
            some = rows[low : low + PAGE]
            self.new.move([(row.key, row) for row in self._rows(some)])
            self._stored(some)

    def _stored(self, rows: Sequence[Written]) -> None:
        """These are in the new collection now: many do not wait in its records."""
        for each in rows:
            self.left_out.pop(each.row.key, None)
        if self.new.fresh_count >= FLUSHED:
            self.new.flush()

    def _rows(self, rows: Sequence[Written]) -> list[NewRow]:
        """As they are written to the new collection."""
        thumbnails = self.old.thumbnails([each.id for each in rows])
        return [each.row._replace(origin=self._encoder.origin, thumbnail=thumbnails.get(each.id)) for each in rows]

    def _leave_out(self, written: Written, reason: str, more: str = "") -> None:
        """What the new collection held under its key goes: it is of an earlier write."""
        self._forget([written.row.key])
        self.left_out[written.row.key] = f"{reason}: {more}" if more else reason
        self._left_at[written.row.key] = written.sequence

    def settle(self) -> None:
        """Take out of `left_out` what a later write has overtaken, such as one whose original was swept meanwhile: that
        write is among the lag, and is replayed with it."""
        for key in list(self.left_out):
            if self.old.written_at(key) != self._left_at[key]:
                del self.left_out[key]

    def _forget(self, keys: Sequence[str]) -> None:
        if keys:
            self.new.delete(keys)
        for key in keys:
            self.left_out.pop(key, None)


def check_lineage(old: Readable, new: Collection) -> None:
    """Raises `RefusalError` where `new` does not follow `old`, or holds writes that `old` does not have."""
    if not new.manifest.follows:
        raise RefusalError(f"{new.folder} follows no other collection: choose another --out")
    restored = old.manifest.restored
    if new.manifest.follows != old.uid:
        if restored is None or restored.uid != new.manifest.follows or new.followed > restored.sequence:
            raise RefusalError(
                f"{new.folder} follows the collection {new.manifest.follows} up to its write {new.followed:,}, "
                f"{old.folder} is {old.uid}: choose another --out"
            )
        new.follow_restored(old.uid)
    if new.followed > old.latest():
        raise RefusalError(
            f"{new.folder} holds what was written up to write {new.followed:,}, {old.folder} ends with write "
            f"{old.latest():,}, so it is an earlier copy: choose another --out"
        )


def reembed(asked: IndexReembed) -> None:
    """Make or continue the new collection. Raises `RefusalError`; what was embedded stays."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    if not NAME.fullmatch(asked.out.name):
        raise RefusalError(f"{asked.out.name!r} cannot be a collection's name: {NAME_RULE}; choose another --out")
    bundle = Bundle.open(asked.bundle)
    with closing(Follower(asked.old, every=None)) as old:
        if old.space_id == bundle.space_id:
            raise RefusalError(
                f"{asked.old} is of the bundle's space {bundle.space_id} already, its vectors would be the same: name "
                "another encoder with --bundle"
            )
        there = (asked.out / "collection.json").is_file()
        new = Collection(asked.out, bundle.space_id) if there else None
        try:
            if new is not None:
                asked.check(new.manifest.policy, asked.out)
                check_lineage(old, new)
            found = survey(old, new, asked.trust_sources)
            _announce(found, asked, console)
            if new is not None and not found.again and old.latest() - new.followed <= asked.lag:
                console.print(f"{asked.out} has caught up with {asked.old}")
                return
            if new is None:
                new = Collection.create(
                    asked.out, bundle.space_id, bundle.dim, asked.policy(old.manifest.policy), follows=old.uid,
                    keep_originals=old.manifest.keep_originals, thumbnail_pixels=old.manifest.thumbnail_pixels,
                )  # fmt: skip
            _replay(old, new, found, asked, bundle, console)
        finally:
            if new is not None:
                new.close()


def _announce(found: Survey, asked: IndexReembed, console: Console) -> None:
    """Say what there is to do. Raises `RefusalError` where some of it cannot be done, unless it is to be left out."""
    where = ", ".join(f"{count:,} from {place}" for place, count in sorted(found.there.items()))
    console.print(f"{sum(found.there.values()):,} items to embed{f' ({where})' if where else ''}")
    if not found.without:
        return
    count = found.without.total()
    if not asked.leave_out:
        raise RefusalError(
            f"{count:,} items of {asked.old} cannot be embedded again: {found.sentence()}. Nothing was done; to go on "
            "without them pass --leave-out"
        )
    console.print(f"{count:,} items are left out: {found.sentence()}")


def _replay(
    old: Follower, new: Collection, found: Survey, asked: IndexReembed, bundle: Bundle, console: Console
) -> None:
    """Embed until the lag is small enough, and list what was left out."""
    with closing(Encoder(bundle, asked, console.print)) as encoder:
        work = Reembedding(old, new, encoder, console, asked.trust_sources)
        console.print(
            f"embedding with {bundle.space_id}, {encoder.runtime.variant} on {encoder.runtime.provider} "
            f"({encoder.runtime.provider_reason})"
        )
        try:
            for low in range(0, len(found.again), ROUND):
                work.put(found.again[low : low + ROUND])
            while (lag := work.lag) > asked.lag:
                console.print(f"{lag:,} writes of {asked.old} are not in {asked.out} yet")
                work.step()
            work.settle()
        finally:
            listed = sorted((key, _reason(why)) for key, why in work.left_out.items())
            write_unreadable(asked.out / "unreadable.tsv", listed)
        work.close()
    old.refresh()  # it is still the collection that was followed
    new.flush()
    if 2 * work.embedded >= len(new):  # most of it is new: as few segments as can be
        new.compact(everything=True)
    else:
        new.maintain()
    console.print(
        f"done: {asked.out} holds {len(new):,} items, up to write {new.followed:,} of {asked.old}, a lag of {work.lag:,} "
        f"({work.embedded:,} embedded now, {len(listed):,} left out)   next: likewise serve{bundle_flag(asked.bundle)} "
        f"--collections {asked.out}"
    )
    if listed and not asked.leave_out:
        raise RefusalError(
            f"{len(listed):,} items could not be embedded, such as {printable(listed[0][0])} ({listed[0][1]}): see "
            f"{asked.out / 'unreadable.tsv'}; run it again once they can be, or accept it with --leave-out"
        )


def _reason(why: str) -> str:
    word, _, more = why.partition(": ")
    return more or WITHOUT[word].removeprefix("have ")
