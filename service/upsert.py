"""`likewise upsert`: pictures of this machine into a collection of a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from export.bundle import RefusalError, printable
from export.preprocess import UnreadablePictureError
from service.config import ClientTls
from service.query import only_collection

# Reasons that are said one by one.
SAID = 20


class Upsert(BaseModel):
    """Send pictures to a server, which embeds and stores them. Run again, it sends those whose key the collection does not
    have; it does not notice that a picture has changed, see --again."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    images: CliPositionalArg[str]
    """Where the pictures are: a folder (subfolders are searched), a glob, a list (.csv, .tsv, .jsonl, .parquet), tar shards,
    or a URL of these."""
    server: str = "localhost:50051"
    """Address of the server."""
    collection: str | None = None
    """Name of the collection; not needed where the server has one only."""
    create: bool = False
    """Make the collection where it does not exist."""
    again: bool = False
    """Send those, too, whose key the collection has: they replace what is there."""
    key: str | None = None
    """API key, NAME.SECRET, where the server asks for one."""
    timeout: float = 120.0
    """Seconds that 256 pictures may take."""
    tls: ClientTls = ClientTls()
    """How the server is trusted, and what it is shown."""

    def cli_cmd(self) -> int:
        """Run the command."""
        from export.sources.listing import list_sources
        from service.client import CallError, Client, NewItem

        sources = list_sources([self.images], with_fields=True)
        unusable = list(sources.unreadable)
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        try:
            with Client(self.server, self.timeout, key=self.key, tls=self.tls) as client:
                known = [c.name for c in client.collections()]
                name = self.collection or only_collection(known)
                if self.create and name not in known:
                    client.create_collection(name)
                there = set() if self.again else {item.key for item in client.items(name)}
                todo = [picture for picture in sources.items if picture.key not in there]
                sent: list[str] = []

                def items() -> Iterator[NewItem]:
                    for picture in todo:
                        try:
                            data = picture.read()
                        except UnreadablePictureError as e:
                            unusable.append((picture.key, str(e)))
                            bar.advance(task)
                            continue
                        sent.append(picture.key)
                        fields = getattr(picture, "fields", "")
                        payload = json.loads(fields) if fields else {"folder": picture.folder} if picture.folder else {}
                        yield NewItem(picture.key, image=data, payload=payload, source_uri=picture.uri)

                columns = (TextColumn("sending"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                stored = 0
                with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
                    task = bar.add_task("", total=len(todo))
                    for number, result in enumerate(client.upsert_many(name, items())):
                        if isinstance(result, int):
                            stored += 1
                        elif result.reason.startswith(("IMAGE_", "BAD_")):
                            unusable.append((sent[number], str(result)))
                        else:  # of the server or the collection: the next would fare no better
                            raise result
                        bar.advance(task)
        except CallError as e:
            raise RefusalError(f"{e}; what was stored stays: run the same command again to continue") from e
        for key, reason in unusable[:SAID]:
            console.print(f"left out: {printable(key)}: {printable(reason)}")
        if len(unusable) > SAID:
            console.print(f"left out: {len(unusable) - SAID:,} more")
        skipped = len(sources.items) - len(todo)
        console.print(
            f"{stored:,} pictures stored in {name!r}, {skipped:,} were there already, {len(unusable):,} could not be used"
        )
        return 0
