"""`likewise index merge`: collections that several machines have built become one."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pydantic_settings import CliPositionalArg
from rich.console import Console

from export.bundle import Embeddings, RefusalError
from service.collection import Collection
from service.config import Constraints
from service.reading import read_manifest
from service.records import Made
from service.store import NAME, NAME_RULE

# Rows that are copied at a time, and about the bytes of these, thumbnails included.
GROUP, GROUP_BYTES = 200_000, 256 * 2**20


class IndexMerge(Constraints):
    """Make one collection of several of one space, such as those that `index build --shard` has built."""

    collections: CliPositionalArg[list[Path]]
    """The collection folders. Of items with the same key those of the last folder stay."""
    out: Path
    """The collection to write; what it holds already stays."""

    def cli_cmd(self) -> int:
        """Run the command."""
        merge(self)
        return 0


def merge(asked: IndexMerge) -> None:
    """Copy every item, with what is known of its file. Raises `RefusalError`; what was copied before stays."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    if not NAME.fullmatch(asked.out.name):
        raise RefusalError(f"{asked.out.name!r} cannot be a collection's name: {NAME_RULE}; choose another --out")
    if asked.out.resolve() in {folder.resolve() for folder in asked.collections}:
        raise RefusalError(f"{asked.out} is one of the collections to be merged: choose another --out")
    target: Collection | None = None
    try:
        for folder in asked.collections:
            source = Collection(folder, None if target is None else target.space_id)
            try:
                if target is None:
                    if (asked.out / "collection.json").is_file():
                        target = Collection(asked.out, source.space_id)
                        asked.check(target.manifest.policy, asked.out)
                    else:
                        policy = asked.policy(source.manifest.policy)
                        manifests = [read_manifest(each, source.space_id) for each in asked.collections]
                        target = Collection.create(
                            asked.out, source.space_id, source.dim, policy,
                            keep_originals=any(each.keep_originals for each in manifests),
                            thumbnail_pixels=max(each.thumbnail_pixels for each in manifests),
                        )  # fmt: skip
                _copy(source, target)
            finally:
                source.close()
            console.print(f"{folder}: {asked.out} holds {len(target):,} items now")
        assert target is not None
        target.flush()
        target.compact(everything=True)
        for segment in target.segments():
            console.print(
                f"segment {segment.number:04d}: {segment.rows:,} rows, {segment.info.factory}: {segment.info.why}"
            )
    finally:
        if target is not None:
            target.close()


def _copy(source: Collection, target: Collection) -> None:
    """Group by group, in the order in which they were written."""
    held: list[tuple[pa.Table, Embeddings]] = []
    for rows, vectors in source.scan():
        held.append((_known(source, rows), vectors))
        if sum(len(rows) for rows, _ in held) >= GROUP or sum(rows.nbytes for rows, _ in held) >= GROUP_BYTES:
            _add(source, target, held)
            held = []
    if held:
        _add(source, target, held)


def _known(source: Collection, rows: pa.Table) -> pa.Table:
    """Rows with everything that is known of them, in columns named as the fields of `NewRow`."""
    rows = rows.select(["key", "payload", "source_uri"])
    keys = rows["key"].to_pylist()
    made = source.made(keys)
    kinds = (pa.string(), pa.int64(), pa.int64(), pa.string(), pa.large_binary())
    for name, kind in zip(Made._fields, kinds, strict=True):
        rows = rows.append_column(name, pa.array([getattr(made[key], name) for key in keys], kind))
    return rows


def _add(source: Collection, target: Collection, held: list[tuple[pa.Table, Embeddings]]) -> None:
    rows = pa.concat_tables([rows for rows, _ in held], promote_options="permissive")
    kept = rows.filter(pc.is_null(rows["file_size"]))["file_sha256"].drop_null().to_pylist()
    with target.originals.carried_over(source.originals, kept):
        target.add_table(rows, [vectors for _, vectors in held])
