"""Settings of `likewise index build` and `likewise serve`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import NoDecode

from export.bundle import RefusalError
from export.preprocess import DecodeLimits
from export.shipped import DEFAULT, BundleFolder
from service.policy import IndexPolicy


class Embedding(BaseModel):
    """How pictures are embedded."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    bundle: BundleFolder = Field(Path(DEFAULT), validate_default=True)
    """The bundle that embeds pictures: a folder, or the name of an encoder that comes with likewise (`likewise bundle
    list`); the default one of those where absent."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to embed; cpu keeps indexes off the GPU, too."""
    variant: Literal["auto", "fp32", "fp16", "int8"] = "auto"
    """Which of the bundle's graphs: one by name, or the fastest here of those that find fp32's neighbours."""
    require_provider: bool = False
    """Refuse to start where the graph, or one of its operators, would run elsewhere than on the device's provider."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; the process's quota where absent."""
    gpu_memory: float | None = Field(None, gt=0)
    """Most GPU memory for ONNX Runtime's CUDA provider, in GiB (TensorRT is left out then); what batches need where
    absent."""
    cuda_graphs: bool = False
    """Capture a CUDA graph per batch size and replay it: less time between small batches on a GPU."""
    limits: DecodeLimits = DecodeLimits()
    """What pictures are accepted."""


class Constraints(BaseModel):
    """What a collection's indexes have to keep to; what is not given stays as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    index: str | None = None
    """auto (the default of a new collection): chosen from the constraints below. exact: every row is compared. Or a FAISS
    factory string, such as IVF1024,SQ8 or HNSW32."""
    max_memory: str | None = None
    """Most memory of the indexes, such as 800M or 4G."""
    min_recall: float | None = Field(None, gt=0, le=1)
    """Recall@10 against exact search that a search has to reach (0.95 for a new collection)."""
    max_latency: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Most milliseconds of one query in one segment."""
    stored: Literal["float32", "float16"] | None = None
    """How vectors are stored; float16 takes half the disk and moves scores by up to 0.001."""

    @field_validator("max_memory")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None:
            bytes_in(value)
        return value

    def policy(self, before: IndexPolicy | None = None) -> IndexPolicy:
        """With what is given changed."""
        given = {
            "index": self.index, "min_recall": self.min_recall, "max_latency_ms": self.max_latency, "vectors": self.stored,
            "max_memory": None if self.max_memory is None else bytes_in(self.max_memory),
        }  # fmt: skip
        changed = {name: value for name, value in given.items() if value is not None}
        return IndexPolicy.model_validate({**(before or IndexPolicy()).model_dump(), **changed})

    def check(self, kept: IndexPolicy, collection: Path) -> None:
        """Raises `RefusalError` where other constraints are given than a collection keeps to."""
        if self.policy(kept) != kept:
            raise RefusalError(
                f"{collection} keeps to other constraints ({kept.model_dump(exclude_none=True)}): change them with "
                "`likewise index compact`, then go on"
            )


def bytes_in(size: str) -> int:
    """800M, 4G, 1.5GiB or plain bytes as a number. Raises `ValueError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", size, re.IGNORECASE)
    amount = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if not amount:
        raise ValueError(f"{size!r} is no size: write one such as 800M or 4G")
    return amount


class IndexBuild(Embedding, Constraints):
    """Embed pictures and build a collection. Run again, it continues, or adds what is new or changed."""

    images: Annotated[list[str], NoDecode]
    """Where the pictures are: a folder (subfolders are searched), a glob, a list (.csv, .tsv, .jsonl, .parquet), tar shards
    (WebDataset, shard-{0000..0099}.tar), or a URL of these (s3://, gs://, https://). Of several, each with its --images, or
    all with commas between."""
    out: Path
    """The collection folder to write; its name is the collection's name."""
    payload: Path | None = None
    """A table of what is known of the pictures (.csv, .tsv, .jsonl or .parquet): a column `key`, such as their path below
    the folder, and others that become fields of the payload, to filter and group by."""
    thumbnails: int | None = None
    """Keep a JPEG of each picture that is embedded, of so many pixels (32 to 1024) on its longer side; 0: none. Where
    absent: as the collection was made with."""
    keep_originals: bool = False
    """Of a new collection: keep the pictures that clients send as bytes, so that another encoder can embed them again."""
    shard: str | None = Field(None, pattern=r"^[1-9]\d*/[1-9]\d*$")
    """i/n: the i-th of n parts, by the hash of the key, so that n machines share the pictures; `likewise index merge` joins
    what they built."""

    @field_validator("images", mode="before")
    @classmethod
    def _specs(cls, value: object) -> object:
        return _separated(value) if isinstance(value, str) else [str(value)] if isinstance(value, Path) else value

    @field_validator("thumbnails")
    @classmethod
    def _pixels(cls, value: int | None) -> int | None:
        if value and not 32 <= value <= 1024:
            raise ValueError("a thumbnail has 32 to 1024 pixels; 0 keeps none")
        return value

    def cli_cmd(self) -> int:
        """Run the command."""
        from service.build import build

        build(self)
        return 0


def _separated(given: str) -> list[str]:
    """What stands between commas; a path or a glob's folder that is there may have some in its name."""
    parts, specs = given.split(","), []
    while parts:
        whole = (n for n in range(len(parts), 1, -1) if _is_there(",".join(parts[:n])))
        taken = next(whole, 1)
        specs.append(",".join(parts[:taken]))
        parts = parts[taken:]
    return [spec for spec in specs if spec]


def _is_there(path: str) -> bool:
    folder = re.split(r"[*?\[{]", path, maxsplit=1)[0].rpartition("/")[0]
    return os.path.lexists(path) or ("," not in path[len(folder) :] and os.path.isdir(folder))  # noqa: PTH112


class IndexSync(IndexBuild):
    """Make a collection follow a folder: embed new and changed pictures, rename moved ones, delete those whose file is gone.

    Items that clients wrote are left alone.
    """

    dry_run: bool = False
    """Say what would be done, and do nothing."""
    max_delete: float = Field(0.1, ge=0, le=1)
    """Refuse to delete more than this share of the items: the folder may be the wrong one, or not mounted."""

    def cli_cmd(self) -> int:
        """Run the command."""
        from service.build import sync

        sync(self)
        return 0


class Tls(BaseModel):
    """Certificates, as PEM files."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    certificate: Path | None = None
    """The server's, with those between it and its authority; the ports are then opened with TLS."""
    key: Path | None = None
    """Its private key, without a password."""
    client_ca: Path | None = None
    """Authority whose certificates clients have to show (mutual TLS)."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError(
                "a certificate needs its key, and a key its certificate: give --tls.certificate and --tls.key"
            )
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client certificates need TLS: give --tls.certificate and --tls.key, too")
        return self


class ClientTls(BaseModel):
    """How a server is trusted, and what it is shown; PEM files."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    on: bool = False
    """Use TLS, with the authorities that this machine trusts."""
    ca: Path | None = None
    """Use TLS, with this authority."""
    certificate: Path | None = None
    """The client's certificate, for mutual TLS."""
    key: Path | None = None
    """Its private key."""


class Connections(BaseModel):
    """What a connection may do."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    keepalive_seconds: float = Field(60.0, ge=1)
    """How long a silent client is left alone before it is pinged."""
    keepalive_timeout_seconds: float = Field(20.0, ge=1)
    """How long it may take to answer; then it is taken for gone."""
    ping_seconds: float = Field(10.0, ge=0.1)
    """How often a client may ping; one that does so much more often is cut off."""
    max_age_seconds: float | None = Field(None, ge=1)
    """After that a connection is closed, once its calls are done, so that balancers spread clients anew."""
    max_age_grace_seconds: float = Field(300.0, ge=0)
    """How long such calls may take."""
    max_idle_seconds: float | None = Field(None, ge=1)
    """A connection without calls is closed after that."""
    max_streams: int = Field(1024, ge=1)
    """Calls at one time on one connection; others wait at the client."""
    handshake_seconds: float = Field(10.0, ge=0.1)
    """How long a new connection may take to speak TLS and HTTP/2; then it is closed."""
    most: int = Field(10_000, ge=1)
    """Connections at one time on one port; others are closed at once."""

    def options(self) -> list[tuple[str, int]]:
        """As gRPC names them."""
        given = {
            "keepalive_time_ms": self.keepalive_seconds, "keepalive_timeout_ms": self.keepalive_timeout_seconds,
            "http2.min_ping_interval_without_data_ms": self.ping_seconds, "max_connection_age_ms": self.max_age_seconds,
            "max_connection_age_grace_ms": self.max_age_grace_seconds if self.max_age_seconds else None,
            "max_connection_idle_ms": self.max_idle_seconds, "server_handshake_timeout_ms": self.handshake_seconds,
            "http2.settings_timeout": self.handshake_seconds, "http2.ping_timeout_ms": self.keepalive_timeout_seconds,
        }  # fmt: skip
        options = [(f"grpc.{name}", int(value * 1000)) for name, value in given.items() if value is not None]
        return [
            *options, ("grpc.max_concurrent_streams", self.max_streams), ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_allowed_incoming_connections", self.most),
        ]  # fmt: skip


class Serve(Embedding):
    """Serve a bundle and its collections over gRPC, with Prometheus metrics on a port of their own."""

    collections: Path = Path("collections")
    """A folder of collections (made where absent), or a single collection."""
    other_bundles: list[BundleFolder] = []
    """More bundles: collections of their spaces are served, too."""
    follow: bool = False
    """Serve what another process of this machine writes to the collections, as it is committed; writes are refused here
    (READ_ONLY)."""
    releases: Path | None = None
    """A folder of releases, NAME/bundle and NAME/COLLECTION: the encoder of a collection can be exchanged for one of them
    while it is served (ReleaseService)."""
    snapshots: Path | None = None
    """A folder that clients may have snapshots taken into (SnapshotCollection); where absent, they may not."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface, which is for networks of your own unless there are --keys or
    client certificates."""
    port: int = Field(50051, ge=0, le=65535)
    """gRPC port; 0 takes a free one and prints it."""
    admin_port: int | None = Field(None, ge=0, le=65535)
    """A port of their own for the methods that need the role admin; the other port then refuses them."""
    admin_host: str = "127.0.0.1"
    """Address of that port."""
    tls: Tls = Tls()
    """Certificates."""
    keys: Path | None = None
    """File of API keys (YAML or JSON), see `likewise keys new`; read again on SIGHUP. Without it everybody may do all."""
    connections: Connections = Connections()
    """What a connection may do."""
    reflection: Literal["on", "admin", "off"] = "on"
    """Where the API describes itself: on both ports, on the admin port, or nowhere."""
    http_port: int | None = Field(None, ge=0, le=65535)
    """A port for HTTP and JSON, for browsers and curl; 0 takes a free one. Extra [http]."""
    http_host: str = "127.0.0.1"
    """Address of that port."""
    http_origins: Annotated[list[str], NoDecode] = []
    """Web pages that may call it, such as https://shop.example; * for all. Of several, each with its --http-origins, or all
    with commas between."""
    metrics_port: int = Field(9464, ge=0, le=65535)
    """Prometheus port; 0 turns it off."""
    max_batch: int = Field(32, ge=1, le=64)
    """Pictures per run of the encoder; where a CPU embeds in lanes, each takes a quarter of its share of them at a time."""
    max_wait_ms: float = Field(2.0, ge=0)
    """How long a batch waits for pictures that are being decoded; one that comes alone does not wait."""
    queue_limit: int = Field(512, ge=1)
    """Pictures that may wait or be worked on; beyond that requests are refused at once with RESOURCE_EXHAUSTED. One client
    may hold half of them while others ask, too."""
    search_limit: int = Field(1024, ge=1)
    """Searches that may wait for a thread; beyond that likewise."""
    decoders: Literal["threads", "processes"] = "threads"
    """Where pictures are decoded. Processes are slower; one that is stuck in a picture, or dies of it, is replaced."""
    decode_seconds: float = Field(10.0, gt=0)
    """Longest time that a decoding process may take for a picture."""
    max_message_mb: int = Field(64, ge=1, le=1024)
    """Largest request, in MiB."""
    limits: DecodeLimits = DecodeLimits(max_bytes=32 * 2**20, max_pixels=50_000_000)
    """What pictures are accepted."""
    check_seconds: float = Field(10.0, gt=0)
    """How often the canary picture and query are tried; readiness follows their outcome."""
    drain_seconds: float = Field(0.0, ge=0)
    """After SIGTERM: how long to answer NOT_SERVING, and still serve, before no new call is taken."""
    grace_seconds: float = Field(10.0, ge=0)
    """After that: how long calls in flight may take. A second SIGTERM ends the server at once."""
    log_format: Literal["text", "json"] = "text"
    """The log on standard error: sentences, or one JSON object per line."""
    log_calls: bool | None = None
    """One line per call; where absent: in JSON."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector that traces go to (OTLP over gRPC), such as http://localhost:4317; extra [otel]."""
    trace_share: float = Field(1.0, ge=0, le=1)
    """Share of calls that are traced, of those that do not come with a trace."""

    @field_validator("http_origins", mode="before")
    @classmethod
    def _origins(cls, value: object) -> object:
        given = value if isinstance(value, list) else [value]
        found = [part.strip() for each in given for part in str(each).split(",")]
        for origin in found:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+", origin):
                raise ValueError(f"{origin!r} is no origin: write one such as https://shop.example, without a path")
        return found

    @model_validator(mode="after")
    def _separate(self) -> Self:
        if self.reflection == "admin" and self.admin_port is None:
            raise ValueError("reflection on the admin port needs one: give --admin-port")
        return self

    def cli_cmd(self) -> int:
        """Run the command."""
        # gRPC's own log lines would stand beside our sentences; whoever wants them sets the variable.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        from service.server import serve

        return serve(self)
