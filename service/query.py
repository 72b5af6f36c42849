"""`likewise query`: the neighbours of a picture, as a table and as a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from export.bundle import RefusalError, printable
from export.preprocess import PictureFile, UnreadablePictureError
from service.config import ClientTls


class Query(BaseModel):
    """Ask a server for the neighbours of a picture; print them as a table, or draw them as a contact sheet."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    picture: CliPositionalArg[Path]
    """The picture to find neighbours of."""
    server: str = "localhost:50051"
    """Address of the server."""
    collection: str | None = None
    """Name of the collection; not needed where the server has one only."""
    top_k: int = Field(10, ge=1, le=10_000)
    """How many neighbours."""
    filter: str = ""
    """Only items for which it holds, such as 'folder = "beach" AND year >= 2020' (AIP-160, see docs/collections.md)."""
    group_by: str = ""
    """A payload field: of the items that share its value only the best comes."""
    expand: int = Field(0, ge=0, le=100)
    """Move the query towards so many of its neighbours first (alpha query expansion)."""
    out: Path | None = None
    """Draw a contact sheet into this file (.png or .jpg)."""
    images: Path | None = None
    """Where the collection's pictures lie on this machine, if not where they were indexed."""
    key: str | None = None
    """API key, NAME.SECRET, where the server asks for one."""
    tls: ClientTls = ClientTls()
    """How the server is trusted, and what it is shown."""

    def cli_cmd(self) -> int:
        """Run the command."""
        from service.client import CallError, Client

        try:
            status = self.picture.stat()
            data = PictureFile(self.picture.name, self.picture, status.st_size, status.st_mtime_ns).read()
        except OSError as e:
            raise RefusalError(f"{self.picture} cannot be read ({e.strerror}): give a picture file") from e
        except UnreadablePictureError as e:
            raise RefusalError(f"{self.picture}: {e}") from e
        try:
            with Client(self.server, key=self.key, tls=self.tls) as client:
                name = self.collection or only_collection([c.name for c in client.collections()])
                neighbors = client.search(
                    name, image=data, top_k=self.top_k, filter=self.filter, group_by=self.group_by, expand=self.expand,
                    with_thumbnails=self.out is not None,
                )  # fmt: skip
        except CallError as e:
            picture = f"{self.picture}: " if e.reason.startswith("IMAGE_") else ""
            raise RefusalError(f"{picture}{e}") from e
        table = Table("", "key", "score", "payload", box=None)
        for rank, neighbor in enumerate(neighbors, 1):
            payload: dict[str, Any] = {k: v for k, v in neighbor.payload.items() if v != ""}
            shown = Text(printable(str(payload))) if payload else ""
            table.add_row(str(rank), Text(printable(neighbor.key)), f"{neighbor.score:.3f}", shown)
        Console(highlight=False, markup=False).print(table)
        if not neighbors:
            print(f"no item passes the filter {self.filter!r}" if self.filter else f"the collection {name!r} is empty")
        if self.out:
            from service.sheet import Tile, draw_sheet, picture_of

            tiles = [
                Tile(picture_of(n.source_uri, n.key, self.images) or n.thumbnail, f"{n.score:.3f} {n.key}")
                for n in neighbors
            ]
            draw_sheet([(Tile(data, self.picture.name), tiles)], self.out)
            print(f"drawn in {self.out}")
        return 0


def only_collection(names: list[str]) -> str:
    """The one that a server has. Raises `RefusalError`."""
    if len(names) != 1:
        known = ", ".join(names[:10]) or "none"
        raise RefusalError(f"the server has {len(names)} collections ({known}): choose one with --collection")
    return names[0]
