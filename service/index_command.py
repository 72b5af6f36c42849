"""`likewise index info | compact`: what a collection holds, and one segment in the place of many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg
from rich.console import Console

from service.collection import Collection, SegmentInfo

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
        collection = Collection(self.collection)
        try:
            found, segments = describe(collection), collection.segments()
        finally:
            collection.close()
        print(json.dumps(found, indent=2) if self.json_ else "\n".join(_lines(found, segments)))
        return 0


class IndexCompact(BaseModel):
    """Merge a collection's segments into one, without deleted and replaced rows."""

    model_config = _CONFIG
    collection: CliPositionalArg[Path]
    """The collection folder."""

    def cli_cmd(self) -> int:
        """Run the command."""
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        collection = Collection(self.collection)
        try:
            before = _bytes(self.collection)
            collection.flush()
            merged = collection.compact(everything=True)
            collection.shrink()
            said = f"{merged} segments merged" if merged else "nothing to merge"
            console.print(
                f"{said}: {len(collection):,} items, {before / 2**20:,.1f} → {_bytes(self.collection) / 2**20:,.1f} MiB"
            )
        finally:
            collection.close()
        return 0


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
        "",
        f"{'segment':<9}{'rows':>12}{'dead':>10}{'MiB':>10}  {'index':<20}{'visits':>7}{'recall@10':>11}",
    ]
    for segment in segments:
        lines.append(
            f"{segment.number:04d}     {segment.rows:>12,}{segment.dead:>10,}{segment.bytes / 2**20:>10,.1f}  "
            f"{segment.info.factory:<20}{segment.info.visits or 'all':>7}{segment.info.recall_at_10:>11.3f}"
        )
    return lines


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
