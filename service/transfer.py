"""`likewise index add | export`: embeddings as npy and Parquet, from elsewhere and for elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg
from rich.console import Console

from export.bundle import Bundle, RefusalError, make_folder, publish, write_file
from export.shipped import BundleFolder
from export.sources.lists import missing, plain
from service.collection import Collection, check_payload
from service.config import Constraints
from service.errors import ServiceError
from service.index import BLOCK, Stored
from service.store import NAME, NAME_RULE

_OWN = ("key", "source_uri", "payload")
# Files of rows are joined into segments of about so many.
SEGMENT_ROWS = 1_000_000


class IndexAdd(Constraints):
    """Add embeddings that were computed elsewhere: matrices as .npy, and their rows as Parquet."""

    collection: CliPositionalArg[Path]
    """The collection folder; it is made where absent, and then --bundle or --space-id is needed."""
    vectors: Path
    """A .npy file of floats [N, D], or a folder of them."""
    rows: Path
    """A Parquet file, or a folder of as many as there are .npy files, in the same order: a column `key`, optionally
    `source_uri` and `payload` (JSON objects); every other column becomes a field of the payload."""
    bundle: BundleFolder | None = None
    """The bundle that made the embeddings."""
    space_id: str | None = Field(None, min_length=1, max_length=200)
    """Where no bundle made them: a name for their space, the same for all that may be compared."""

    def cli_cmd(self) -> int:
        """Run the command."""
        add(self)
        return 0


class IndexExport(BaseModel):
    """Write the items of a collection as vectors.npy and rows.parquet, ready for `likewise index add`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    collection: CliPositionalArg[Path]
    """The collection folder."""
    out: Path
    """The folder to write, which must not exist."""

    def cli_cmd(self) -> int:
        """Run the command."""
        export(self.collection, self.out)
        return 0


def add(asked: IndexAdd) -> None:
    """Add precomputed embeddings. Raises `RefusalError`; parts that were added before stay."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    matrices, tables = _files(asked.vectors, ".npy"), _files(asked.rows, ".parquet")
    if len(matrices) != len(tables):
        raise RefusalError(
            f"{asked.vectors} has {len(matrices)} .npy files and {asked.rows} {len(tables)} Parquet files: give one for one"
        )
    opened = [(_matrix(path), path) for path in matrices]
    for (matrix, path), rows in zip(opened, tables, strict=True):
        found = _metadata(rows).num_rows
        if found != len(matrix):
            raise RefusalError(f"{path} has {len(matrix):,} vectors and {rows} {found:,} rows: give one row per vector")
        if matrix.shape[1] != opened[0][0].shape[1]:
            raise RefusalError(
                f"{path} has vectors of {matrix.shape[1]} dimensions, {matrices[0]} of {opened[0][0].shape[1]}: give "
                "those of one encoder"
            )
    space = _space(asked)
    if (asked.collection / "collection.json").is_file():
        collection = Collection(asked.collection, space)
        try:
            asked.check(collection.manifest.policy, asked.collection)
        except RefusalError:
            collection.close()
            raise
    else:
        if space is None:
            raise RefusalError(
                f"{asked.collection} is not a collection yet: pass --bundle, or --space-id with a name for the encoder"
            )
        if not NAME.fullmatch(asked.collection.name):
            raise RefusalError(f"{asked.collection.name!r} cannot be a collection's name: {NAME_RULE}")
        collection = Collection.create(asked.collection, space, opened[0][0].shape[1], asked.policy())
    try:
        if opened[0][0].shape[1] != collection.dim:
            raise RefusalError(
                f"{matrices[0]} has vectors of {opened[0][0].shape[1]} dimensions, {asked.collection} holds "
                f"{collection.dim}: give those of the encoder that the collection was built with"
            )
        total, done = sum(len(matrix) for matrix, _ in opened), 0
        for (matrix, path), rows in zip(opened, tables, strict=True):
            table = _table(rows)
            for low in range(0, len(matrix), SEGMENT_ROWS):
                part = table.slice(low, SEGMENT_ROWS)
                try:
                    collection.add_table(part, matrix[low : low + SEGMENT_ROWS])
                except ServiceError as e:
                    raise RefusalError(f"{path}, {rows}: {e}") from None
                done += len(part)
                console.print(f"{done:,} of {total:,} rows added")
        if collection.merge_due:
            console.print("merging segments")
            collection.maintain()
        for segment in collection.segments():
            console.print(
                f"segment {segment.number:04d}: {segment.rows:,} rows, {segment.info.factory}: {segment.info.why}"
            )
        console.print(f"done: {asked.collection} holds {len(collection):,} items")
    finally:
        collection.close()


def export(folder: Path, out: Path) -> None:
    """Write vectors.npy [N, D], rows.parquet and export.json. Raises `RefusalError`."""
    if out.exists():
        raise RefusalError(f"{out} exists already: choose another folder")
    collection = Collection(folder)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        make_folder(temporary)
        schema = pa.schema(
            [("key", pa.large_string()), ("source_uri", pa.large_string()), ("payload", pa.large_string())]
        )
        header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (len(collection), collection.dim)}
        with (
            (temporary / "vectors.npy").open("wb") as file,
            pq.ParquetWriter(temporary / "rows.parquet", schema) as writer,
        ):
            np.lib.format.write_array_header_2_0(file, header)
            for rows, vectors in collection.scan():
                file.write(np.ascontiguousarray(vectors, np.float32).data)
                writer.write_table(rows.select(schema.names).cast(schema))
        about = {
            "space_id": collection.space_id, "dim": collection.dim, "items": len(collection),
            "sequence": collection.sequence, "made_by": sorted(collection.origins),
        }  # fmt: skip
        write_file(temporary / "export.json", json.dumps(about, indent=2))
        publish(temporary, out)
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(
            f"{out} holds {len(collection):,} items of {collection.dim} dimensions, space {collection.space_id}"
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        collection.close()


def _space(asked: IndexAdd) -> str | None:
    if asked.bundle is not None and asked.space_id is not None:
        raise RefusalError("both --bundle and --space-id were given: give one, the bundle names its space")
    return asked.space_id if asked.bundle is None else Bundle.open(asked.bundle).space_id


def _files(path: Path, suffix: str) -> list[Path]:
    """A file, or the files of a folder by name, numbers in their order."""
    if path.is_dir():
        found = sorted(
            path.glob(f"*{suffix}"), key=lambda p: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", p.name)]
        )
        if not found:
            raise RefusalError(f"{path} holds no {suffix} files: give the folder that does")
        return found
    if not path.is_file():
        raise RefusalError(f"{path} does not exist: give a {suffix} file, or a folder of them")
    return [path]


def _matrix(path: Path) -> Stored:
    try:
        matrix: Stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as e:
        raise RefusalError(f"{path} cannot be read as .npy ({e}): write it with numpy.save") from None
    if matrix.ndim != 2 or matrix.dtype not in (np.float32, np.float16, np.float64) or not len(matrix):
        raise RefusalError(f"{path} holds {matrix.dtype} of shape {matrix.shape}: expected floats of shape [N, D]")
    return matrix


def _metadata(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as e:
        raise RefusalError(f"{path} cannot be read as Parquet ({str(e).splitlines()[0]}): write it anew") from None


def _table(path: Path) -> pa.Table:
    """key, payload (JSON), source_uri. Raises `RefusalError`."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as e:
        raise RefusalError(f"{path} cannot be read as Parquet ({str(e).splitlines()[0]}): write it anew") from None
    if "key" not in table.column_names:
        raise RefusalError(f"{path} has the columns {', '.join(table.column_names)}: expected one called key")
    for name in ("key", *({"source_uri", "payload"} & set(table.column_names))):
        kind = table.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise RefusalError(f"{path} has a column {name} of {kind}: expected strings")
    if table["key"].null_count:
        raise RefusalError(f"{path} has {table['key'].null_count:,} rows without a key: give each its own")
    fields = table.drop_columns([name for name in _OWN if name in table.column_names])
    uris = table["source_uri"].fill_null("") if "source_uri" in table.column_names else _constant("", len(table))
    given = table["payload"].fill_null("{}") if "payload" in table.column_names else _constant("{}", len(table))
    payloads = _payloads(path, given, fields) if fields.column_names or "payload" in table.column_names else given
    return pa.table({"key": table["key"], "payload": payloads, "source_uri": uris})


def _payloads(path: Path, given: pa.ChunkedArray, fields: pa.Table) -> pa.Array:
    """JSON objects of a column of them and of columns of their own."""

    def made() -> Iterator[str]:
        for low in range(0, len(given), BLOCK):
            own = fields.slice(low, BLOCK).to_pylist() if fields.column_names else repeat({})
            for text, row in zip(given.slice(low, BLOCK).to_pylist(), own, strict=False):
                try:
                    payload = json.loads(text)
                    payload.update((name, value) for name, value in row.items() if not missing(value))
                    made = json.dumps(payload, allow_nan=False, default=plain)
                    check_payload(made, "payload")
                    yield made
                except (ValueError, AttributeError, TypeError, RecursionError, ServiceError) as e:
                    raise RefusalError(
                        f"{path} has a row whose payload is no JSON object ({e}): {text[:60]!r} and the columns {row}"
                    ) from None

    return pa.array(made(), pa.large_string())


def _constant(value: str, count: int) -> pa.ChunkedArray:
    return pa.chunked_array([pa.repeat(value, count)])
