"""Prometheus metrics of a server, in a registry of its own; names pass `promtool check metrics`."""

from __future__ import annotations

import ctypes
import functools
import resource
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from export.bundle import Embeddings, RefusalError
from service.follower import Follower
from service.reading import Readable
from service.store import Store

_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192)
_SHORT = (0.0001, 0.0002, 0.0004, 0.0008, *_SECONDS)
_BATCH = (1, 2, 4, 8, 16, 32, 64)
_SCORES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
# The mean of queries is that of about so many, and is said once there were a tenth of them.
_RECENT = 1000
# Searches whose queries go into it together.
_TOGETHER = 32
# Rows that a collection's mean is taken over.
_BASELINE = 10_000


class Metrics:
    """Every metric as an attribute."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "likewise_requests", "RPCs finished, by method and status code.", ["method", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "likewise_request_duration_seconds", "Time an RPC took on the server.", ["method"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("likewise_requests_in_flight", "RPCs being worked on.", registry=registry)
        self.images = Counter(
            "likewise_images", "Pictures received, by outcome (ok, or the refusal's reason).", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self.decode_seconds = Histogram(
            "likewise_image_decode_duration_seconds", "Time to decode and resize one picture.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.queue_depth = Gauge("likewise_queue_depth", "Pictures admitted and not yet answered.", registry=registry)
        self.queue_seconds = Histogram(
            "likewise_queue_wait_seconds",
            "Time that a picture waited for a decoder (decode) or its batch (batch), or a search for its turn (search).",
            ["stage"], buckets=_SHORT, registry=registry,
        )  # fmt: skip
        self.rejected = Counter(
            "likewise_queue_rejected", "Pictures that were not embedded, by reason.", ["reason"], registry=registry
        )
        self.batch_size = Histogram(
            "likewise_batch_size", "Pictures per run of the encoder.", buckets=_BATCH, registry=registry
        )
        self.inference_seconds = Histogram(
            "likewise_inference_duration_seconds",
            "Time of one run of the encoder.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.search_seconds = Histogram(
            "likewise_search_duration_seconds",
            "Time of one search in a collection.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.answer_seconds = Histogram(
            "likewise_search_answer_duration_seconds",
            "Time to make the answers of searches that went through the index together.",
            buckets=_SHORT, registry=registry,
        )  # fmt: skip
        self.key_pictures = Counter(
            "likewise_key_images", "Pictures admitted, by the name of the API key.", ["key"], registry=registry
        )
        self.drift = Drift(registry)
        self.snapshots: dict[str, float] = {}
        """When the last snapshot of a collection was taken, by its uid."""
        self.ready = Gauge("likewise_ready", "1 while the canary picture and query come back right.", registry=registry)
        self.build_info = Gauge(
            "likewise_build_info",
            "Constant 1; what is running.",
            ["version", "space_id", "provider"],
            registry=registry,
        )

    def watch(self, store: Store, releases: Callable[[], Iterable[ReleaseSaid]]) -> None:
        """Export what is read at each scrape: sizes of collections, releases, the process, the GPU."""
        self.registry.register(_Sizes(store, self.drift, self.snapshots))
        self.registry.register(_Releases(releases))
        self.registry.register(_Faults())
        self.registry.register(_GpuMemory())
        ProcessCollector(registry=self.registry)

    def serve(self, host: str, port: int) -> None:
        """Answer /metrics on a port of its own. Raises `RefusalError` when the port is taken."""
        try:
            start_http_server(port, host, self.registry)
        except OSError as e:
            raise RefusalError(
                f"the metrics port {host}:{port} cannot be opened ({e.strerror}): pass another --metrics-port"
            ) from e


class Drift:
    """Whether queries still look like what a collection holds: scores of their best neighbours, and how far their mean is
    from the mean of the collection's vectors. Searches report from several threads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._scores = Histogram(
            "likewise_top1_score", "Score of the best neighbour, of searches without a filter.", ["collection"],
            buckets=_SCORES, registry=registry,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._means: dict[str, tuple[str, Embeddings, float]] = {}  # by name: uid, mean of queries, and their number
        self._recent: dict[str, tuple[str, list[Embeddings]]] = {}  # uid, and queries that are not in the mean yet
        self._baselines: dict[str, tuple[str, int, Embeddings]] = {}  # uid, items, mean

    def searched(self, collection: Readable, queries: Embeddings, best: Sequence[float]) -> None:
        """Queries [Q, D] of one collection, and the scores of their best neighbours."""
        name = collection.name
        scores = self._scores.labels(name)
        for score in best:
            scores.observe(score)
        with self._lock:
            uid, recent = self._recent.get(name, ("", []))
            if uid != collection.uid:  # the first of its queries, or of another encoder since the last
                recent = []
                self._recent[name] = (collection.uid, recent)
            recent.append(queries)
            if len(recent) >= _TOGETHER:
                self._fold(name)

    def _fold(self, name: str) -> None:
        """Take what came since into the mean. Under the lock."""
        uid, recent = self._recent.pop(name, ("", []))
        if recent:
            queries = np.concatenate(recent)
            before, mean, seen = self._means.get(name, ("", queries[0], 0.0))
            if before != uid:
                mean, seen = np.zeros(queries.shape[1], np.float32), 0.0
            share = len(queries) / min(seen + len(queries), _RECENT)
            mean = mean + min(1.0, share) * (queries.mean(0) - mean)
            self._means[name] = (uid, mean, seen + len(queries))

    def shift(self, collection: Readable) -> float | None:
        """Euclidean distance of the means; None while too little is known."""
        with self._lock:
            self._fold(collection.name)
            uid, mean, seen = self._means.get(collection.name, ("", None, 0.0))
        if mean is None or uid != collection.uid or seen < _RECENT / 10 or not len(collection):
            return None
        return float(np.linalg.norm(mean - self._baseline(collection)))

    def forget(self, kept: set[str]) -> None:
        """Collections that are no more."""
        with self._lock:
            for name in (set(self._means) | set(self._recent)) - kept:
                self._means.pop(name, None)
                self._recent.pop(name, None)
                self._baselines.pop(name, None)
                self._scores.remove(name)

    def _baseline(self, collection: Readable) -> Embeddings:
        """Mean of the vectors, anew where the collection has changed by a tenth. One scrape reads some 10,000 rows, once."""
        uid, items, mean = self._baselines.get(collection.name, ("", 0, None))
        if mean is not None and uid == collection.uid and abs(len(collection) - items) <= items / 10:
            return mean
        view = collection.view
        every = max(1, len(collection) // _BASELINE)
        rows = [
            part.segment.vectors_at(np.flatnonzero(part.flags())[::every]) for part in view.parts
        ] + [view.fresh.vectors_at(view.fresh.positions()[::every])]  # fmt: skip
        vectors = np.concatenate([each for each in rows if len(each)])
        baseline: Embeddings = vectors.mean(0, dtype=np.float64).astype(np.float32)
        self._baselines[collection.name] = (collection.uid, len(collection), baseline)
        return baseline


class _Sizes(Collector):
    def __init__(self, store: Store, drift: Drift, snapshots: Mapping[str, float]) -> None:
        self._store, self._drift, self._snapshots = store, drift, snapshots

    def collect(self) -> Iterable[Metric]:
        label = ["collection"]
        items = GaugeMetricFamily("likewise_collection_items", "Items that can be found.", labels=label)
        fresh = GaugeMetricFamily("likewise_collection_fresh_items", "Items that no segment holds yet.", labels=label)
        vectors = GaugeMetricFamily(
            "likewise_index_vectors",
            "Vectors by where they are: in segments, fresh, or deleted and not yet compacted away.",
            labels=["collection", "part"],
        )
        size = GaugeMetricFamily("likewise_index_size_bytes", "Segments on the disk.", labels=label)
        wal = GaugeMetricFamily("likewise_wal_bytes", "Write-ahead log of the records.", labels=label)
        lag = GaugeMetricFamily(
            "likewise_follower_lag_seconds",
            "Of a server that follows: time since it last saw everything that was committed.",
            labels=label,
        )
        shift = GaugeMetricFamily(
            "likewise_embedding_mean_shift",
            "Distance of the mean of recent queries from the mean of the collection's vectors.",
            labels=label,
        )
        recall = GaugeMetricFamily(
            "likewise_index_recall_ratio",
            "Recall@10 against exact search, measured when the segments were made; the mean of their rows.",
            labels=label,
        )
        snapshot = GaugeMetricFamily(
            "likewise_last_snapshot_timestamp_seconds",
            "When SnapshotCollection last copied the collection, since the server started.",
            labels=label,
        )
        collections = self._store.all()
        for collection in collections:
            name = [collection.name]
            try:
                segments = collection.segments()
            except FileNotFoundError:  # merged or deleted meanwhile: the next scrape sees it as it is then
                continue
            waiting = collection.fresh_count
            items.add_metric(name, len(collection))
            fresh.add_metric(name, waiting)
            vectors.add_metric([*name, "segments"], sum(s.rows - s.dead for s in segments))
            vectors.add_metric([*name, "fresh"], waiting)
            vectors.add_metric([*name, "deleted"], sum(s.dead for s in segments))
            size.add_metric(name, sum(s.bytes for s in segments))
            wal.add_metric(name, _size(collection.folder / "records.sqlite-wal"))
            if isinstance(collection, Follower):
                lag.add_metric(name, time.monotonic() - collection.looked)
            if rows := sum(s.rows for s in segments):
                recall.add_metric(name, sum(s.rows * s.info.recall_at_10 for s in segments) / rows)
            if (taken := self._snapshots.get(collection.uid)) is not None:
                snapshot.add_metric(name, taken)
            moved = self._drift.shift(collection)
            if moved is not None:
                shift.add_metric(name, moved)
        self._drift.forget({c.name for c in collections})
        return [items, fresh, vectors, size, wal, recall, snapshot, lag, shift]


class ReleaseSaid(NamedTuple):
    """A release of a collection, as it stands."""

    collection: str
    release: str
    """Its name; '' for the server's own bundle."""
    space_id: str
    state: str
    """live, or the state of what stands beside that, such as catching_up."""
    lag: int
    """Writes of the live one that it does not hold."""


class _Releases(Collector):
    def __init__(self, said: Callable[[], Iterable[ReleaseSaid]]) -> None:
        self._said = said

    def collect(self) -> Iterable[Metric]:
        labels = ["collection", "release"]
        info = GaugeMetricFamily(
            "likewise_release_info", "Constant 1; what a collection is served from, and what stands beside that.",
            labels=[*labels, "space_id", "state"],
        )  # fmt: skip
        lag = GaugeMetricFamily(
            "likewise_release_lag_writes",
            "Writes that a release beside the live one does not hold yet.",
            labels=labels,
        )
        for each in self._said():
            info.add_metric([each.collection, each.release, each.space_id, each.state], 1)
            if each.state != "live":
                lag.add_metric([each.collection, each.release], each.lag)
        return [info, lag]


class _Faults(Collector):
    def collect(self) -> Iterable[Metric]:
        """Page faults that went to the disk: the first sign of an index that no longer fits memory."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        for kind, count in (("major", used.ru_majflt), ("minor", used.ru_minflt)):
            faults = CounterMetricFamily(f"process_{kind}_page_faults", f"Page faults of this process, {kind} ones.")
            faults.add_metric([], count)
            yield faults


class _GpuMemory(Collector):
    def collect(self) -> Iterable[Metric]:
        """Memory of each GPU, whoever uses it; nothing without an NVIDIA driver."""
        used = GaugeMetricFamily("likewise_gpu_memory_used_bytes", "GPU memory in use.", labels=["gpu"])
        total = GaugeMetricFamily("likewise_gpu_memory_total_bytes", "GPU memory.", labels=["gpu"])
        for number, (taken, size) in enumerate(gpu_memory()):
            used.add_metric([str(number)], taken)
            total.add_metric([str(number)], size)
        return [used, total] if used.samples else []


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@functools.cache
def _nvml() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:  # no driver
        return None
    return library if library.nvmlInit_v2() == 0 else None


def gpu_memory() -> list[tuple[int, int]]:
    """(bytes in use, bytes in all) of each GPU, by the driver's own library; empty without one."""
    library, found = _nvml(), []
    count = ctypes.c_uint()
    if library is not None and library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
        for number in range(count.value):
            device, memory = ctypes.c_void_p(), _Memory()
            if (
                library.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(device)) == 0
                and library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0
            ):
                found.append((memory.used, memory.total))
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
