"""Every series of the server, on one registry, with label values from closed sets.

Counters and histograms are told what happened (`RequestTracker`, `observe_step`); gauges are asked at each scrape
(`LoadSource`), so they cannot drift and are 0 at idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol as TypingProtocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.request_tracker import NO_MODE, Outcome, Protocol, RequestRecord, RequestTracker, Route, outcome_of
from serve.runtimes.base import StepStats

__all__ = ["NO_MODE", "Metrics", "Outcome", "Protocol", "RequestRecord", "RequestTracker", "Route", "outcome_of"]

# A Flan-T5 request often ends within tens of milliseconds and a step can take less than one, so the grids are fine
# at the low end: inter-token latency from 0.5 ms, the others from 1 ms.
_LATENCY_SECONDS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_TOKEN_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_BATCH_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_BATCH_SEQUENCES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)


class LoadSource(TypingProtocol):
    """Whom the gauges ask. Read from whatever thread scrapes, so the properties must be plain reads."""

    @property
    def requests_running(self) -> int: ...
    @property
    def requests_waiting(self) -> int: ...
    @property
    def sequences_running(self) -> int: ...
    @property
    def engine_up(self) -> bool: ...


class Metrics:
    """The registry and everything on it.

    Args:
        registry: where the series live; an own one by default (the global one would mix two servers of a process).
        on_request_end: told of every finished request (the log); called in the event loop, so it must be quick.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        on_request_end: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        # One more series for each counter and histogram, which nobody here reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry() if registry is None else registry
        self._on_request_end = on_request_end
        self._requests = self._counter("requests", "Finished requests.", ("protocol", "route", "mode", "outcome"))
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began to run.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens, counted as they are made.")
        self.unknown_tokens = self._counter("unknown_tokens", "Prompt tokens that the vocabulary lacks.")
        self.exemplars_dropped = self._counter("exemplars_dropped", "Exemplars left out so that the prompt fits.")
        self._encoder_cache_hits = self._counter("encoder_cache_hits", "Prompts whose encoder output was kept.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _LATENCY_SECONDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one sequence.", _TOKEN_SECONDS
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "Arrival until the engine began the request.", _LATENCY_SECONDS
        )
        self._request_duration = self._histogram(
            "request_duration_seconds", "Arrival to the end, however it ended.", _LATENCY_SECONDS
        )
        self._encode_batch = self._histogram("encode_batch_tokens", "Prompt tokens encoded in a step.", _BATCH_TOKENS)
        self._decode_batch = self._histogram("decode_batch_sequences", "Sequences decoded in a step.", _BATCH_SEQUENCES)
        steps = Histogram(
            "flan_engine_step_seconds",
            "Time of one engine step by phase.",
            ("phase",),
            registry=self.registry,
            buckets=_TOKEN_SECONDS,
        )
        self._encode_seconds, self._decode_seconds = steps.labels("encode"), steps.labels("decode")
        self._gauges = _LoadGauges()
        self.registry.register(self._gauges)

    def track(self, protocol: Protocol, route: Route) -> RequestTracker:
        """Begin to follow a request; its arrival is now."""
        return RequestTracker(self.record, protocol, route)

    def record(self, record: RequestRecord) -> None:
        """Count a finished request (called by its tracker, once)."""
        self._requests.labels(record.protocol, record.route, record.mode, record.outcome).inc()
        self._request_duration.observe(record.total_ms / 1000)
        if self._on_request_end is not None:
            self._on_request_end(record)

    def observe_step(self, stats: StepStats) -> None:
        """Take in one engine step; thread-safe and cheap, so it is given to the runtime as its `on_step`."""
        if stats.encode_tokens > 0:
            self._encode_batch.observe(stats.encode_tokens)
            self._encode_seconds.observe(stats.encode_seconds)
        if stats.decode_sequences > 0:
            self._decode_batch.observe(stats.decode_sequences)
            self._decode_seconds.observe(stats.decode_seconds)
        if stats.encoder_cache_hits > 0:
            self._encoder_cache_hits.inc(stats.encoder_cache_hits)
        if stats.cache_usage:
            self._gauges.cache_usage = stats.cache_usage

    def watch(self, load: LoadSource) -> None:
        """Ask `load` for the gauges from now on."""
        self._gauges.load = load

    def join(self, registry: CollectorRegistry) -> None:
        """Show another registry's series, too, except those whose names are here already (our aliases of vLLM's)."""
        self.registry.register(_Joined(registry, frozenset(family.name for family in self.registry.collect())))

    def describe_model(self, labels: Mapping[str, str]) -> None:
        """Show `flan_model_info` with these labels."""
        self._gauges.model_info = dict(labels)

    def render(self) -> bytes:
        """All series as Prometheus text."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"flan_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"flan_{name}", help, registry=self.registry, buckets=buckets)


class _Joined(Collector):
    """The series of another registry, at each scrape: only vLLM's own (not those of the process), and no name twice."""

    def __init__(self, registry: CollectorRegistry, taken: frozenset[str]) -> None:
        self._registry = registry
        self._taken = taken

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering would collect, and names would be claimed that come later

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            if family.name.startswith("vllm:") and family.name not in self._taken:
                yield family


class _LoadGauges(Collector):
    """The gauges, made at each scrape from what is true then."""

    def __init__(self) -> None:
        self.load: LoadSource | None = None
        self.cache_usage: tuple[tuple[str, float], ...] = ()
        self.model_info: dict[str, str] | None = None

    def collect(self) -> Iterable[Metric]:
        load = self.load
        running = 0 if load is None else load.requests_running
        waiting = 0 if load is None else load.requests_waiting
        sequences = 0 if load is None else load.sequences_running
        # Only a step reports cache use, and after the last step nobody would lower it.
        usage = self.cache_usage if running > 0 else tuple((pool, 0.0) for pool, _ in self.cache_usage)
        yield GaugeMetricFamily("flan_requests_running", "Requests that the engine works on.", running)
        yield GaugeMetricFamily("flan_requests_waiting", "Accepted requests that have not begun.", waiting)
        yield GaugeMetricFamily("flan_sequences_running", "Unfinished sequences of running requests.", sequences)
        pools = GaugeMetricFamily("flan_cache_usage_ratio", "Used share of the cache, 0 to 1.", labels=("pool",))
        for pool, ratio in usage:
            pools.add_metric([pool], ratio)
        yield pools
        up = 1 if load is not None and load.engine_up else 0
        yield GaugeMetricFamily("flan_engine_up", "1 while a loaded engine is well.", up)
        if self.model_info is not None:
            info = GaugeMetricFamily("flan_model_info", "What is served; always 1.", labels=tuple(self.model_info))
            info.add_metric(list(self.model_info.values()), 1)
            yield info
        # Gateways, autoscalers and benchmark clients know these three names from vLLM.
        yield GaugeMetricFamily("vllm:num_requests_running", "Alias of flan_requests_running.", running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Alias of flan_requests_waiting.", waiting)
        fullest = max((ratio for _, ratio in usage), default=0.0)
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Fullest pool of flan_cache_usage_ratio.", fullest)
