"""Flags of SGLang and vLLM that ask for what is always so here, or for what there is not: whoever brings them along is told,
in a sentence, what to do. Nothing is accepted and ignored.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

ALWAYS = (
    "--enable-metrics", "--enable-cache-report", "--skip-server-warmup", "--disable-log-requests", "--disable-log-stats",
    "--disable-uvicorn-access-log", "--enable-chunked-prefill", "--disable-frontend-multiprocessing",
    "--enable-auto-tool-choice", "--enable-prompt-tokens-details", "--disable-fastapi-docs",
)  # fmt: skip
"""Switches that change nothing: metrics and cached tokens are always reported, requests logged only if that is asked for,
prompts always chunked, calls read wherever their form is known; nothing is warmed up that is optional."""

ONE_DEVICE = "one model on one device is served; start more servers, and a router in front of them"
NO_CORS = "no CORS headers are sent; put a proxy in front that knows your sites"
TEXT_STAYS_OUT = "requests are logged as a line of numbers, never with their texts"

FIXED: dict[tuple[str, ...], tuple[tuple[str, ...], str]] = {
    ("--tp-size", "--tensor-parallel-size", "--tp", "-tp"): (("1",), ONE_DEVICE),
    ("--dp-size", "--data-parallel-size", "--dp", "-dp"): (("1",), ONE_DEVICE),
    ("--pp-size", "--pipeline-parallel-size", "--pp", "-pp"): (("1",), ONE_DEVICE),
    ("--nnodes",): (("1",), ONE_DEVICE),
    ("--node-rank",): (("0",), ONE_DEVICE),
    ("--tokenizer-mode",): (("auto",), "the tokenizer is the one that Transformers chooses"),
    ("--schedule-policy", "--scheduling-policy"): (("fcfs",), "requests are served first come, first served"),
    ("--grammar-backend",): (("llguidance",), "grammars are llguidance's; it is there with the extra 'serve'"),
    ("--log-requests-level",): (("0", "1"), TEXT_STAYS_OUT),
    ("--log-requests-format",): (("text",), TEXT_STAYS_OUT),
    ("--allowed-origins",): (("[]",), NO_CORS),
}
"""Flags, the values that mean what is done here, and what to say to any other."""

REFUSED: dict[tuple[str, ...], str] = {
    ("--admin-api-key",): "there is no route for administrators only; --api-key guards all but /health",
    ("--max-prefill-tokens",): "use --chunked-prefill-size, which bounds the tokens of a step",
    ("--max-num-queued-tokens",): "use --max-queued-requests; one request is bounded by --context-length",
    ("--download-dir",): "use HF_HUB_CACHE, which the Hub's own library reads",
    ("--model-checksum",): "name a commit with --revision; the Hub's library checks what it downloads",
    ("--hf-chat-template-name",): "use --chat-template FILE",
    ("--structured-outputs-config", "--guided-decoding-backend"): "grammars are llguidance's and need no options",
    ("--log-level-http", "--uvicorn-log-level"): "use --log-level, and --log-requests for a line a request",
    ("--decode-log-interval",): "progress is not logged; read /metrics",
    ("--enable-trace", "--otlp-traces-endpoint"): "traces are not written; read /metrics",
    ("--crash-dump-folder",): "requests are not written to disk",
    ("--soft-watchdog-timeout",): "use --watchdog-timeout, which ends the process",
    ("--dist-init-addr",): ONE_DEVICE,
    (
        "--enable-deterministic-inference",
    ): "a request with a seed repeats itself, up to the rounding of other batch sizes",
    ("--allow-credentials", "--allowed-methods", "--allowed-headers"): NO_CORS,
    ("--max-logprobs",): "up to 20 are returned over HTTP",
    (
        "--override-generation-config",
        "--preferred-sampling-params",
    ): "send them with the requests, or use --sampling-defaults",
    (
        "--incremental-streaming-output",
        "--stream-output",
    ): "/generate streams the whole text so far; /v1/completions pieces",
    ("--block-size", "--page-size"): "pages have 16 tokens",
    ("--enable-ssl-refresh",): "certificates are read once; restart the server for new ones",
    ("--enable-lora", "--lora-paths", "--lora-modules"): "adapters are not served; merge them into the checkpoint",
    ("--speculative-algorithm", "--speculative-config"): "tokens are not speculated",
    ("--enable-custom-logit-processor", "--logits-processors"): "code is not accepted from requests",
    (
        "--cpu-offload-gb",
        "--swap-space",
    ): "weights and cache stay on one device; quantize further, or shrink --context-length",
}
"""Flags, and what to do instead."""


class _Fixed(argparse.Action):
    """Takes the values that mean what is done anyway. Leaves nothing in the namespace."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, values: Sequence[str], why: str, nargs: str | None = None
    ):
        super().__init__(option_strings, dest, nargs, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.values, self.why = values, why

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values not in self.values:
            only = f" (only {' or '.join(self.values)})" if self.values else ""
            parser.error(f"{option_string} cannot be served{only}: {self.why}.")


def foreign_options(parser: argparse.ArgumentParser) -> None:
    """Know all of them; ``--help`` does not list them."""
    for flag in ALWAYS:
        parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for flags, (values, why) in FIXED.items():
        parser.add_argument(*flags, action=_Fixed, values=values, why=why)
    for flags, why in REFUSED.items():
        parser.add_argument(*flags, action=_Fixed, nargs="?", values=(), why=why)
