"""What Prometheus reads: names and meanings of vLLM's, under ``relinear:``. Gauges are read from the engine when asked."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from runtime.plan import LoadPlan
from runtime.request import Delta
from runtime.stream import Stream
from runtime.worker import Worker

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
LATENCIES = {
    "time_to_first_token_seconds": "From the arrival of a request to its first token",
    "inter_token_latency_seconds": "Between two tokens of a request",
    "e2e_request_latency_seconds": "From the arrival of a request to its end",
    "request_queue_time_seconds": "From the arrival of a request to its first forward pass",
    "request_prefill_time_seconds": "From the first forward pass of a request to its first token",
    "request_decode_time_seconds": "From the first token of a request to its end",
}


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._worker: Worker | None = None
        self._latencies = {
            name: Histogram(f"relinear:{name}", text, ["model_name"], buckets=SECONDS, registry=self.registry).labels(
                model_name
            )
            for name, text in LATENCIES.items()
        }
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts that were answered")
        self._generated = self._counter("generation_tokens", "Tokens that were generated").labels(model_name)
        self._ended = self._counter("request_success", "Samples that ended, by reason", "finished_reason")
        self._rejected = self._counter("requests_rejected", "Requests that were refused, by status", "reason")
        self._aborted = self._counter("aborted", "Requests that were given up, by cause", "cause")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"relinear:{name}", text, ["model_name", *labels], registry=self.registry)

    def watch(self, worker: Worker) -> None:
        """Report this worker's engine as well."""
        self._worker = worker
        self.registry.register(self)

    def rejected(self, status: int) -> None:
        self._rejected.labels(self._model_name, str(status)).inc()

    def aborted(self, cause: str) -> None:
        self._aborted.labels(self._model_name, cause).inc()

    def delta(self, stream: Stream, delta: Delta, now: float) -> None:
        """Count what one step that ended ``now`` gave one sample."""
        key = (delta.uid, delta.index)
        if delta.token_ids:
            self._generated.inc(len(delta.token_ids))
            if key not in stream.token_times:
                started = stream.submitted + delta.queue_seconds
                self._observe("time_to_first_token_seconds", now - stream.submitted)
                self._observe("request_queue_time_seconds", delta.queue_seconds)
                self._observe("request_prefill_time_seconds", now - started)
                stream.token_times[key] = (now, now)
            else:
                first, last = stream.token_times[key]
                self._observe("inter_token_latency_seconds", now - last)
                stream.token_times[key] = (first, now)
        if delta.finish_reason is not None:
            first, _ = stream.token_times.get(key, (now, now))
            self._observe("request_decode_time_seconds", now - first)
            self._observe("e2e_request_latency_seconds", now - stream.submitted)
            self._ended.labels(self._model_name, delta.finish_reason.value).inc()

    def prompts(self, stream: Stream) -> None:
        self._prompt.labels(self._model_name).inc(sum(map(len, stream.prompts)))

    def _observe(self, name: str, seconds: float) -> None:
        self._latencies[name].observe(max(0.0, seconds))

    def collect(self) -> Iterator[Any]:
        """The engine's numbers, for the registry."""
        engine = self._worker.engine if self._worker else None
        if engine is None:
            return
        stats = engine.stats()
        gauges = {
            "num_requests_running": (stats.running, "Sequences in the running batch"),
            "num_requests_waiting": (stats.waiting, "Sequences that wait"),
            "kv_cache_usage_perc": (1 - stats.free_blocks / stats.blocks, "Held part of the KV cache, 0 to 1"),
        }
        counters = {
            "nan_logits": (stats.nan_logits, "Samples that ended because their logits were NaN or infinite"),
            "num_preemptions": (stats.preemptions, "Sequences that gave their blocks back"),
            "prefix_cache_queries": (stats.prefix_queries, "Prompt tokens looked for in the prefix cache"),
            "prefix_cache_hits": (stats.prefix_hits, "Prompt tokens found in the prefix cache"),
        }
        for families, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (value, text) in values.items():
                family = families(f"relinear:{name}", text, labels=["model_name"])
                family.add_metric([self._model_name], value)
                yield family

        yield from self._weights(engine.loaded.plan)

    def _weights(self, plan: LoadPlan) -> Iterator[Any]:
        """How much of the model is quantized, and how."""
        method = plan.method.name if plan.method else "none"
        quantized = [module for module in plan.quantized if not module.dequantized]
        held = GaugeMetricFamily(
            "relinear:weights_bytes", "Bytes of the loaded weights", labels=["model_name", "method"]
        )
        packed = sum(module.nbytes for module in quantized)
        for name, size in ((method, packed), ("dense", plan.weight_bytes - packed)):
            if size:
                held.add_metric([self._model_name, name], size)
        yield held
        modules = GaugeMetricFamily(
            "relinear:quantized_modules", "Quantized linear layers", labels=["model_name", "method", "bits"]
        )
        for bits, count in sorted(Counts(module.scheme.kind.bits for module in quantized if module.scheme).items()):
            modules.add_metric([self._model_name, method, str(bits)], count)
        yield modules

    def text(self) -> bytes:
        return generate_latest(self.registry)
