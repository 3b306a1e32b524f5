"""What the server counts, in the text format of Prometheus.

Counters of the engine are read when somebody asks; times are observed as they happen.

    metrics = Metrics()
    meter = metrics.meter("stories", engine)
    metrics.text()
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from onebit.engine.engine import Engine
from onebit.engine.model import LAYER_INPUTS

FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INTERVAL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NATS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)

# Fields of the engine's statistics, and what they are called outside.
GAUGES = {
    "running": ("texts_running", "Texts that the engine is computing"),
    "waiting": ("texts_waiting", "Texts that wait for room in a batch or in the cache"),
    "blocks_total": ("kv_blocks", "Blocks of the key-value cache"),
    "blocks_used": ("kv_blocks_used", "Blocks that texts hold"),
    "blocks_cached": ("kv_blocks_cached", "Blocks that nobody holds and that are kept for their prefix"),
}
COUNTERS = {
    "prefix_query_tokens": ("prefix_query_tokens", "Prompt tokens that were looked up in the prefix cache"),
    "prefix_hit_tokens": ("prefix_hit_tokens", "Prompt tokens that were found there"),
    "preemptions": ("preemptions", "Texts that gave up their blocks to be computed again"),
    "steps": ("engine_steps", "Forward passes"),
    "step_tokens": ("engine_step_tokens", "Tokens in forward passes"),
}
# What the engine counts of inputs of linear layers, in the order of its array.
CODES = (
    ("input_codes", "Codes that linear layers read in the steps that were looked at"),
    ("saturated_codes", "Those of them that are the least or the largest"),
    ("zero_codes", "Those of them that are zero"),
)


class Meter:
    """What happens with one model."""

    def __init__(self, metrics: "Metrics", model: str) -> None:
        self.interval = metrics.interval.labels(model)
        self.failed_steps = metrics.failed_steps.labels(model)
        self.batch = metrics.batch.labels(model)
        self.tokens = metrics.completion_tokens.labels(model)
        self._flipped = metrics.flipped.labels(model)
        self._checks = metrics.checks.labels(model)
        self._checked = metrics.checked.labels(model)
        self._kv_entropy = metrics.kv_entropy
        self._model = model

    def cache_looked(self, layer: int, key_bits: float, value_bits: float) -> None:
        """Take in the entropy of keys and values of a layer."""
        self._kv_entropy.labels(self._model, layer, "keys").observe(key_bits)
        self._kv_entropy.labels(self._model, layer, "values").observe(value_bits)

    def weights_checked(self, changed: list[str]) -> None:
        """Take in the names of tensors that are not as in the file."""
        self._flipped.set(len(changed))
        self._checks.inc()
        self._checked.set(time.time())


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._engines = _EngineCollector()
        registry.register(self._engines)
        self.requests = Counter(
            "onebit_requests", "Requests answered", ["path", "model", "outcome"], registry=registry
        )
        self.prompt_tokens = Counter(
            "onebit_prompt_tokens", "Tokens of prompts", ["model"], registry=registry
        )
        self.completion_tokens = Counter(
            "onebit_completion_tokens", "Tokens generated", ["model"], registry=registry
        )
        self.first_token = Histogram(
            "onebit_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            ["model"],
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self.interval = Histogram(
            "onebit_inter_token_seconds",
            "Between two tokens of a text",
            ["model"],
            buckets=INTERVAL_S,
            registry=registry,
        )
        self.duration = Histogram(
            "onebit_request_seconds",
            "From a request's arrival to the end of its answer",
            ["model"],
            buckets=REQUEST_S,
            registry=registry,
        )
        self.batch = Histogram(
            "onebit_batch_texts",
            "Texts that got a token in a step",
            ["model"],
            buckets=TEXTS,
            registry=registry,
        )
        self.failed_steps = Counter(
            "onebit_failed_steps", "Forward passes that failed", ["model"], registry=registry
        )
        self.repetition = Histogram(
            "onebit_repetition",
            "Share of 3-grams of a request's text that it had before",
            ["model"],
            buckets=SHARES,
            registry=registry,
        )
        self.entropy = Histogram(
            "onebit_entropy_nats",
            "Mean entropy of the distributions that some tokens of a request were drawn from",
            ["model"],
            buckets=NATS,
            registry=registry,
        )
        self.kv_entropy = Summary(
            "onebit_kv_entropy_bits",
            "Entropy of the codes of a block of keys, or of values, in the cache",
            ["model", "layer", "part"],
            registry=registry,
        )
        self.flipped = Gauge(
            "onebit_flipped_tensors",
            "Weight tensors whose bytes in memory are not those of the file",
            ["model"],
            registry=registry,
        )
        self.checks = Counter(
            "onebit_weight_checks", "Times that all weights were hashed", ["model"], registry=registry
        )
        self.checked = Gauge(
            "onebit_weight_check_timestamp_seconds",
            "When all weights were last hashed, in Unix time; 0: not yet",
            ["model"],
            registry=registry,
        )
        self.lost_log_lines = Counter(
            "onebit_lost_log_lines", "Lines that could not be written to the log", registry=registry
        )

    def meter(self, model: str, engine: Engine) -> Meter:
        """Watch an engine under the name of its model."""
        self._engines.engines[model] = engine
        return Meter(self, model)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the statistics of all engines when somebody asks."""

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}

    def collect(self) -> Iterator[Metric]:
        stats = {model: engine.stats for model, engine in self.engines.items()}
        for family, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for field, (name, text) in table.items():
                metric = family(f"onebit_{name}", text, labels=["model"])
                for model, values in stats.items():
                    metric.add_metric([model], getattr(values, field))
                yield metric
        for i, (name, text) in enumerate(CODES):
            metric = CounterMetricFamily(f"onebit_{name}", text, labels=["model", "layer", "input"])
            for model, engine in self.engines.items():
                for layer, counts in enumerate(engine.code_counts[..., i].tolist()):
                    for kind, count in zip(LAYER_INPUTS, counts, strict=True):
                        metric.add_metric([model, str(layer), kind], count)
            yield metric
