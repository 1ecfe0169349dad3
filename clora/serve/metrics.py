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
Stats = Callable[[], Mapping[str, Mapping[str, float]]]
"""The batcher's statistics of each model."""
OUTCOMES = ("done", "cancelled", "expired", "failed", "rejected")


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, stats: Stats, is_ready: Callable[[], bool]) -> None:
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

    def on_phase(self, phase: str, seconds: float, number: int | None) -> None:
        """Note a phase of the engine, and how many pictures were worked on together."""
        self.phase.labels(phase).observe(seconds)
        if number is not None:
            self.lane.labels(phase).observe(number)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _Stats:
    """The batchers' statistics, read when they are asked for."""

    def __init__(self, stats: Stats, is_ready: Callable[[], bool]) -> None:
        self._stats, self._is_ready = stats, is_ready

    def collect(self) -> Iterator[Metric]:
        found = self._stats()
        yield GaugeMetricFamily("clora_ready", "Whether edits are taken.", value=float(self._is_ready()))
        kinds = ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS))
        for family, names in kinds:
            for name, key, text in names:
                metric = family(name, text, labels=("model",))
                for model, stats in found.items():
                    metric.add_metric((model,), stats[key])
                yield metric
        samples = CounterMetricFamily("clora_samples", "Samples by what became of them.", labels=("model", "outcome"))
        for model, stats in found.items():
            for outcome in OUTCOMES:
                samples.add_metric((model, outcome), stats[outcome])
        yield samples
