"""Metrics for Prometheus, under vLLM's names."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gptkern.engine.engine import EngineLoad

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960)


class Metrics:
    """The counts and times of a server.

    Args:
        model_name: The label of every value.
        load: The engine's present load.
    """

    def __init__(self, model_name: str, load: Callable[[], EngineLoad]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, load))

        def counter(name: str, text: str, *labels: str) -> Counter:
            made = Counter(f"gptkern:{name}", text, ["model_name", *labels], registry=self._registry)
            return made if labels else made.labels(model_name)

        def histogram(name: str, text: str, bounds: Sequence[float]) -> Times:
            made = Times(f"gptkern:{name}", text, model_name, bounds)
            self._registry.register(made)
            return made

        self._model_name = model_name
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "New tokens.")
        self._success = counter("request_success", "Continuations by why they ended.", "finished_reason")
        self._refused = counter("requests_refused", "Requests that were not served, by status.", "status")
        self.first_token = histogram("time_to_first_token_seconds", "Time to the first token.", _FIRST)
        self.between_tokens = histogram("inter_token_latency_seconds", "Time between tokens.", _BETWEEN)
        self.request = histogram("e2e_request_latency_seconds", "Time of a whole request.", _WHOLE)

    def ended(self, reason: str) -> None:
        """Count a continuation by why it ended."""
        self._success.labels(self._model_name, reason).inc()

    def refused(self, status: int) -> None:
        """Count a request that was answered by an error."""
        self._refused.labels(self._model_name, str(status)).inc()

    def text(self) -> bytes:
        """All values, in the format of ``CONTENT_TYPE``."""
        return bytes(generate_latest(self._registry))


class Times(Collector):
    """A histogram of times. Many equal ones are counted at once, where the library's own takes each alone.

    Args:
        bounds: The buckets' upper ends, ascending.
    """

    def __init__(self, name: str, text: str, model_name: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._model_name, self._bounds = name, text, model_name, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, count: int = 1) -> None:
        """Count a time so many times."""
        self._counts[bisect_left(self._bounds, seconds)] += count
        self._sum += count * seconds

    def collect(self) -> Iterator[Metric]:
        """The counts up to each bound."""
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        ends = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        family.add_metric([self._model_name], buckets=buckets, sum_value=self._sum)
        yield family


class _EngineCollector(Collector):
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, model_name: str, load: Callable[[], EngineLoad]) -> None:
        self._model_name, self._load = model_name, load

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        used = 1 - load.free_pages / load.num_pages
        gauges = (
            ("num_requests_running", "Continuations that run.", load.running),
            ("num_requests_waiting", "Requests that wait.", load.waiting),
            ("kv_cache_usage_perc", "Share of the cache's pages in use, 1 is all.", used),
        )
        counters = (
            ("prefix_cache_queries", "Prompt tokens looked for in the cache.", load.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", load.prefix_hits),
            ("num_preemptions", "Continuations that gave their memory to others.", load.preemptions),
        )
        families: list[tuple[type[Metric], tuple[str, str, float]]] = [
            *((GaugeMetricFamily, gauge) for gauge in gauges),
            *((CounterMetricFamily, counter) for counter in counters),
        ]
        for kind, (name, text, value) in families:
            family = kind(f"gptkern:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
