"""`likewise index info | compact | verify | upgrade | snapshot | restore`: care of a collection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg
from rich.console import Console

from service.collection import Collection
from service.config import Constraints
from service.reading import COLLECTION_FORMAT, SegmentInfo
from service.snapshot import restore, take

_CONFIG = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class IndexInfo(BaseModel):
    """Say what a collection holds. Its checksums are verified on the way; no other process may have it open for writing."""

    model_config = _CONFIG
    collection: CliPositionalArg[Path]
    """The collection folder."""
    json_: bool = Field(False, alias="json")
    """Print it as JSON."""

    def cli_cmd(self) -> int:
        """Run the command."""
        with _opened(self.collection) as collection:
            found, segments = describe(collection), collection.segments()
        print(json.dumps(found, indent=2) if self.json_ else "\n".join(_lines(found, segments)))
        return 0


class IndexCompact(Constraints):
    """Merge a collection's segments into one, without deleted and replaced rows; with constraints, choose its index anew."""

    collection: CliPositionalArg[Path]
    """The collection folder."""

    def cli_cmd(self) -> int:
        """Run the command."""
        console = _console()
        with _opened(self.collection) as collection:
            before = _bytes(self.collection)
            policy = self.policy(collection.manifest.policy)
            if policy != collection.manifest.policy:
                collection.keep_to(policy)
                said = "index built again"
            else:
                collection.flush()
                merged = collection.compact(everything=True)
                said = f"{merged} segments merged" if merged else "nothing to merge"
            collection.shrink()
            swept = collection.sweep()
            if swept.files:
                console.print(
                    f"{swept.files:,} originals of items that are gone removed, {swept.bytes / 2**20:,.1f} MiB"
                )
            console.print(
                f"{said}: {len(collection):,} items, {before / 2**20:,.1f} → {_bytes(self.collection) / 2**20:,.1f} MiB"
            )
            for segment in collection.segments():
                console.print(f"segment {segment.number:04d}: {segment.info.factory}: {segment.info.why}")
        return 0


class IndexVerify(BaseModel):
    """Read a collection whole and compare it with its checksums; with --recover, repair or give up what is damaged."""

    model_config = _CONFIG
    collection: CliPositionalArg[Path]
    """The collection folder."""
    recover: bool = False
    """Make damaged indexes anew. Give up the items of segments whose vectors are damaged or missing, and list them in
    lost.tsv: build or sync embeds them again."""

    def cli_cmd(self) -> int:
        """Run the command."""
        console = _console()
        with _opened(self.collection, self.recover) as collection:
            collection.verify()
            if collection.made_anew:
                numbers = ", ".join(f"{number:04d}" for number in collection.made_anew)
                console.print(
                    f"the index or the columns of {numbers} were damaged, and made anew from vectors and rows"
                )
            if collection.lost:
                console.print(
                    f"{len(collection.lost):,} items were given up, see {self.collection / 'lost.tsv'}; what is left of "
                    f"their segments is in {self.collection / 'damaged'}"
                )
            if collection.damaged_originals:
                console.print(
                    f"the originals of {len(collection.damaged_originals):,} items were missing or damaged, see "
                    f"{self.collection / 'lost-originals.tsv'}: the items stay, another encoder cannot embed them"
                )
            console.print(
                f"sound: {len(collection):,} items in {len(collection.segments())} segments, {collection.fresh_count:,} "
                f"fresh, {_bytes(self.collection) / 2**20:,.1f} MiB read"
            )
        return 0


class IndexUpgrade(BaseModel):
    """Write a collection of an earlier format in the present one."""

    model_config = _CONFIG
    collection: CliPositionalArg[Path]
    """The collection folder."""

    def cli_cmd(self) -> int:
        """Run the command."""
        with _opened(self.collection) as collection:
            before = collection.manifest.format_version
            collection.upgrade()
            _console().print(f"{self.collection}: format {before} → {COLLECTION_FORMAT}, {len(collection):,} items")
        return 0


class IndexSnapshot(BaseModel):
    """Copy a collection as it is at one moment; a server may write to it meanwhile."""

    model_config = _CONFIG
    collection: CliPositionalArg[Path]
    """The collection folder."""
    out: Path
    """The folder to write, which must not exist."""

    def cli_cmd(self) -> int:
        """Run the command."""
        take(self.collection, self.out, _console().print)
        return 0


class IndexRestore(BaseModel):
    """Verify a snapshot and make a collection of it."""

    model_config = _CONFIG
    snapshot: CliPositionalArg[Path]
    """The snapshot's folder."""
    out: Path
    """The collection folder to write, which must not exist; its name is the collection's name."""

    def cli_cmd(self) -> int:
        """Run the command."""
        restore(self.snapshot, self.out, _console().print)
        return 0


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _opened(folder: Path, recover: bool = False) -> Iterator[Collection]:
    collection = Collection(folder, recover=recover)
    try:
        yield collection
    finally:
        collection.close()


def describe(collection: Collection) -> dict[str, Any]:
    """Counts, sizes and segments."""
    segments = collection.segments()
    return {
        "name": collection.name,
        "space_id": collection.space_id,
        "dim": collection.dim,
        "items": len(collection),
        "fresh": collection.fresh_count,
        "sequence": collection.sequence,
        "created": collection.manifest.created.isoformat(),
        "uid": collection.uid,
        "keep_originals": collection.manifest.keep_originals,
        "originals": collection.originals.extent()._asdict(),
        "thumbnail_pixels": collection.manifest.thumbnail_pixels,
        "follows": {"uid": follows, "sequence": collection.followed}
        if (follows := collection.manifest.follows)
        else None,
        "origins": sorted(collection.origins),
        "bytes": _bytes(collection.folder),
        "policy": collection.manifest.policy.model_dump(exclude_none=True),
        "segments": [{**segment._asdict(), "info": segment.info.model_dump()} for segment in segments],
    }


def _lines(found: dict[str, Any], segments: list[SegmentInfo]) -> list[str]:
    lines = [
        f"{found['name']}: {found['items']:,} items of {found['dim']} dimensions, {found['bytes'] / 2**20:,.1f} MiB",
        f"space      {found['space_id']}",
        f"created    {found['created']}, {found['sequence']:,} writes",
        f"vectors    made by {', '.join(found['origins']) or 'clients'}",
        f"fresh      {found['fresh']:,} rows in no segment yet, searched exactly",
        *_kept_lines(found),
        "",
        f"{'segment':<9}{'rows':>12}{'dead':>10}{'MiB':>10}  {'index':<20}{'visits':>7}{'recall@10':>11}",
    ]
    for segment in segments:
        lines.append(
            f"{segment.number:04d}     {segment.rows:>12,}{segment.dead:>10,}{segment.bytes / 2**20:>10,.1f}  "
            f"{segment.info.factory:<20}{segment.info.visits or 'all':>7}{segment.info.recall_at_10:>11.3f}"
        )
    return lines


def _kept_lines(found: dict[str, Any]) -> list[str]:
    """What is kept of pictures, and which collection this one follows, where there is anything to say."""
    kept, lines = found["originals"], []
    if found["keep_originals"] or kept["files"]:
        how = "kept" if found["keep_originals"] else "kept before, not of new items"
        lines.append(
            f"originals  {kept['files']:,} pictures that came as bytes, {kept['bytes'] / 2**20:,.1f} MiB, {how}"
        )
    if found["thumbnail_pixels"]:
        lines.append(f"thumbnails of pictures that come as bytes, {found['thumbnail_pixels']} pixels")
    if found["follows"]:
        lines.append(
            f"follows    the collection {found['follows']['uid']}, up to write {found['follows']['sequence']:,}"
        )
    return lines


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
