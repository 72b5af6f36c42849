"""Prometheus metrics of a server, in a registry of its own; names pass `promtool check metrics`."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from export.bundle import RefusalError
from service.store import Store

_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192)
_BATCH = (1, 2, 4, 8, 16, 32, 64)


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
            "likewise_queue_wait_seconds", "Time a picture waited for its batch.", buckets=_SECONDS, registry=registry
        )
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
        self.ready = Gauge("likewise_ready", "1 while the canary picture and query come back right.", registry=registry)
        self.build_info = Gauge(
            "likewise_build_info",
            "Constant 1; what is running.",
            ["version", "space_id", "provider"],
            registry=registry,
        )

    def watch(self, store: Store) -> None:
        """Export the size of every collection, read at each scrape."""
        self.registry.register(_Sizes(store))

    def serve(self, host: str, port: int) -> None:
        """Answer /metrics on a port of its own. Raises `RefusalError` when the port is taken."""
        try:
            start_http_server(port, host, self.registry)
        except OSError as e:
            raise RefusalError(
                f"the metrics port {host}:{port} cannot be opened ({e.strerror}): pass another --metrics-port"
            ) from e


class _Sizes(Collector):
    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        items = GaugeMetricFamily("likewise_collection_items", "Items that can be found.", labels=["collection"])
        fresh = GaugeMetricFamily(
            "likewise_collection_fresh_items", "Items that no segment holds yet.", labels=["collection"]
        )
        for collection in self._store.all():
            items.add_metric([collection.name], len(collection))
            fresh.add_metric([collection.name], collection.fresh_count)
        return [items, fresh]
