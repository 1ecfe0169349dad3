"""What a server counts, for Prometheus: its requests and refusals, the queue, the batches, the time of each phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SIZES = (1, 2, 4, 8, 16, 32, 64)

# The batcher's own statistics: name here, its key there, what it is.
GAUGES = (
    ("clora_queue_depth", "queued", "Samples that wait for their first step."),
    ("clora_running", "running", "Samples being denoised."),
    ("clora_batch_fill_ratio", "batch_fill", "Mean samples of a step, of those that fit."),
    ("clora_batch_samples", "batch_mean", "Mean samples of a step."),
    ("clora_batch_effects", "effects_mean", "Mean distinct effects of a step."),
    ("clora_batch_effects_max", "effects_max", "Most distinct effects in one step."),
)
COUNTERS = (
    ("clora_steps", "steps", "Steps (forwards of the transformer)."),
    ("clora_denoising_seconds", "busy_seconds", "Time spent in steps."),
)
OUTCOMES = ("done", "cancelled", "expired", "failed", "rejected")


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, stats: Callable[[], Mapping[str, float]], is_ready: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "clora_http_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry
        )
        self.rejects = Counter("clora_rejects", "Requests refused, by reason.", ("reason",), registry=self.registry)
        self.phase = Histogram(
            "clora_phase_seconds", "Time of each phase.", ("phase",), registry=self.registry, buckets=SECONDS
        )
        self.lane = Histogram(
            "clora_lane_batch", "Items worked on together.", ("phase",), registry=self.registry, buckets=SIZES
        )
        self.effects = Counter("clora_effect_samples", "Samples made, by effect.", ("effect",), registry=self.registry)
        self.restarts = Counter("clora_restarts", "Times the engine was started anew.", registry=self.registry)
        self.in_flight = Gauge("clora_edits_in_flight", "Edits being worked on.", registry=self.registry)
        self.registry.register(_Stats(stats, is_ready))

    def on_phase(self, phase: str, seconds: float, number: int) -> None:
        """Note a batch of a lane."""
        self.phase.labels(phase).observe(seconds)
        self.lane.labels(phase).observe(number)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _Stats:
    """The batcher's statistics, read when they are asked for."""

    def __init__(self, stats: Callable[[], Mapping[str, float]], is_ready: Callable[[], bool]) -> None:
        self._stats, self._is_ready = stats, is_ready

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("clora_ready", "Whether edits are taken.", value=float(self._is_ready()))
        for name, key, text in GAUGES:
            yield GaugeMetricFamily(name, text, value=stats[key])
        for name, key, text in COUNTERS:
            yield CounterMetricFamily(name, text, value=stats[key])
        samples = CounterMetricFamily("clora_samples", "Samples by what became of them.", labels=("outcome",))
        for outcome in OUTCOMES:
            samples.add_metric((outcome,), stats[outcome])
        yield samples
