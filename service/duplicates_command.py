"""`likewise duplicates`: groups of items that resemble each other, as JSON Lines, CSV or a contact sheet."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from export.bundle import RefusalError, publish
from service.collection import Collection
from service.duplicates import Group, Progress, SelfSearch
from service.errors import InvalidArgumentError
from service.filter import Filter
from service.sheet import Tile, draw_sheet, picture_of

FIELDS = ("group", "key", "score", "keep", "source_uri")
# Groups of a contact sheet, and the most items of each beside the one kept.
SHEET_GROUPS, SHEET_OTHERS = 20, 7
# Without a terminal, progress is one line in so many seconds.
_TELL_EVERY = 60.0


class Duplicates(BaseModel):
    """Find near duplicates in a collection: groups of items that resemble each other, the largest first. Of each group the
    oldest item is marked as the one to keep; nothing is deleted. No other process may have the collection open for
    writing."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    collection: CliPositionalArg[Path]
    """The collection folder."""
    min_score: float = Field(0.95, ge=-1, le=1, allow_inf_nan=False)
    """Two items resemble each other from this similarity on."""
    filter: str = ""
    """Only items for which it holds, such as 'folder = "beach" AND year >= 2020' (AIP-160, see docs/collections.md)."""
    after: int | None = Field(None, ge=0)
    """Only items written after this sequence number, compared with each other and with all older ones; a run says which
    to give to the next."""
    exact: bool = False
    """Compare every item with every other, where the index is approximate, too."""
    out: Path | None = None
    """Write into this file (.jsonl or .csv) instead of to the standard output, as JSON Lines."""
    sheet: Path | None = None
    """Draw the first 20 groups as a contact sheet into this file (.png or .jpg)."""
    images: Path | None = None
    """Where the collection's pictures lie on this machine, if not where they were indexed."""

    def cli_cmd(self) -> int:
        """Run the command."""
        _check_ending(self.out, "--out", ".jsonl", ".csv")
        _check_ending(self.sheet, "--sheet", ".png", ".jpg", ".jpeg")
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        start = time.monotonic()
        collection = Collection(self.collection)
        try:
            with _progress(console) as progress, _written(self.out) as write:
                wanted = Filter.parse(self.filter) if self.filter else None
                search = SelfSearch(collection, self.min_score, wanted, self.after, self.exact, progress)
                count, others, chained, shown = 0, 0, 0, []
                for count, group in enumerate(search.groups(), 1):
                    others += len(group.others)
                    chained += sum(member.score < self.min_score - 1e-5 for member in group.others)
                    if count <= SHEET_GROUPS:
                        shown.append(group._replace(members=group.members[: 1 + SHEET_OTHERS]))
                    write(count, group)
        except InvalidArgumentError as e:
            raise RefusalError(str(e)) from None
        finally:
            collection.close()
        what = f"{len(search):,} items" if self.after is None else f"{search.asked:,} new items of {len(search):,}"
        console.print(
            f"{what} compared in {time.monotonic() - start:,.0f} s: {count:,} groups of {count + others:,} items, of which "
            f"{others:,} could go (the oldest of each group stays); next time: --after {search.sequence}"
        )
        if chained:
            console.print(
                f"{chained:,} of these are less similar than {self.min_score:g} to the item that stays, and came over "
                "others: look at their scores first, or raise --min-score"
            )
        if self.sheet is not None:
            self._draw(self.sheet, shown, console)
        return 0

    def _draw(self, path: Path, groups: list[Group], console: Console) -> None:
        if not groups:
            console.print("no sheet was drawn: there are no groups")
            return
        rows = []
        for group in groups:
            tiles = [
                Tile(picture_of(m.source_uri, m.key, self.images), f"{m.score:.3f} {m.key}") for m in group.members
            ]
            rows.append((tiles[0], tiles[1:]))
        temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
        try:
            draw_sheet(rows, temporary)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        console.print(f"{len(groups)} groups are drawn in {path}")


def _check_ending(path: Path | None, flag: str, *endings: str) -> None:
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise RefusalError(f"{flag} {path} ends in {path.suffix or 'nothing'!r}: end it in {' or '.join(endings)}")
    if path.is_dir():
        raise RefusalError(f"{flag} {path} is a folder: name a file")
    if not path.absolute().parent.is_dir():
        raise RefusalError(f"{flag} {path}: there is no folder {path.absolute().parent}: make it first")


@contextmanager
def _written(path: Path | None) -> Iterator[Callable[[int, Group], None]]:
    """Writes numbered groups to the standard output as they come, or into a file that is there whole or not at all."""
    if path is None:
        yield _writer(sys.stdout, csv_rows=False)
        sys.stdout.flush()
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield _writer(file, csv_rows=path.suffix.lower() == ".csv")
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _writer(file: IO[str], csv_rows: bool) -> Callable[[int, Group], None]:
    table: Any = csv.writer(file, lineterminator="\n") if csv_rows else None
    if table is not None:
        table.writerow(FIELDS)

    def write(number: int, group: Group) -> None:
        for i, member in enumerate(group.members):
            row = (number, member.key, round(member.score, 6), i == 0, member.source_uri)
            if table is None:
                file.write(json.dumps(dict(zip(FIELDS, row, strict=True))) + "\n")
            else:
                table.writerow([str(value).lower() if isinstance(value, bool) else value for value in row])

    return write


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar with the time that is left; without a terminal a line per minute."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("comparing"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Bar(*columns, console=console, transient=True, speed_estimate_period=120) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    start = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _TELL_EVERY and done:
            told = now
            left = (now - start) * (total - done) / done
            console.print(f"comparing: {done / total:.0%}, about {left / 60:,.0f} minutes left")

    yield tell
