"""The options of the command line, in groups that the commands share.

Flags are spelled as in SGLang, with vLLM's spellings as aliases. Light: ``--help`` imports nothing heavy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from runtime.foreign_options import foreign_options

LOADING = (
    "quantization", "quantization_config", "kernel", "weight_only", "lm_head_quantization",
    "activation_quantization", "attention_backend", "dtype", "device", "trust_remote_code", "revision",
)  # fmt: skip
ENGINE = (
    "tokenizer", "skip_tokenizer_init", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_total_tokens",
    "mem_fraction_static", "kv_cache_memory", "kv_cache_dtype", "enable_prefix_caching", "disable_cuda_graph",
    "fuse", "native",
)  # fmt: skip
QUEUE = ("max_queued_requests", "queue_timeout", "request_timeout", "seed")
SERVER = (
    "host", "port", "served_model_name", "api_key", "api_key_file", "allowed_hosts", "max_body_bytes", "chat_template",
    "tool_call_parser", "reasoning_parser", "ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs",
    "ssl_cert_reqs", "ssl_ciphers", "root_path", "log_requests", "sampling_defaults", "watchdog_timeout", "shutdown_timeout",
    "log_level",
)  # fmt: skip


def loading_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide what is loaded; SGLang's spelling first, then vLLM's."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--quantization", "-q", metavar="FORMAT",
        help="the format you expect, e.g. awq; of a dense checkpoint: what to quantize it to while it loads: int4 (2 to 8), "
        "fp8, bitsandbytes, mxfp4 or w8a8_int8",
    )  # fmt: skip
    group.add_argument("--kernel", metavar="NAME", help="what multiplies by quantized weights; default: the best here")
    group.add_argument(
        "--weight-only",
        action=argparse.BooleanOptionalAction,
        help="leave layers' inputs alone where the checkpoint wants them quantized; default: as the format's own library",
    )
    group.add_argument(
        "--lm-head-quantization",
        metavar="WAY",
        help="int8: rounds an output head that is stored dense (default: left alone)",
    )
    group.add_argument(
        "--activation-quantization", metavar="WAY",
        help="int8: rounds the inputs of layers of integers too (W4A8): faster on CPUs with VNNI, less exact (default: never)",
    )  # fmt: skip
    group.add_argument("--attention-backend", metavar="NAME", help="what attends; default: the best here")
    group.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 (half) or float32 (default: auto)")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    group.add_argument(
        "--load-format", type=_load_format, metavar="F", help="auto or safetensors; there is nothing else that is safe"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code of the checkpoint")
    group.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    quantizing_options(parser)


class QuantizationOption(argparse.Action):
    """Gathers the options of quantizing while loading in ``quantization_config``, under their flags' names."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, option: str = "", value: Any = None, **options: Any
    ) -> None:
        self.option, self.value = option or dest, value
        super().__init__(option_strings, "quantization_config", **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        config = namespace.quantization_config or {}
        namespace.quantization_config = {**config, self.option: self.value if self.nargs == 0 else values}


def quantizing_options(parser: argparse.ArgumentParser) -> None:
    """How a dense checkpoint is quantized while it loads; spelled as in Transformers' and GPTQModel's configurations."""
    group = parser.add_argument_group("quantizing a dense checkpoint while it loads")
    switch: dict[str, Any] = {"action": QuantizationOption, "nargs": 0, "value": True}
    group.add_argument(
        "--group-size", action=QuantizationOption, type=int, metavar="N",
        help="int2 to int8: inputs that share a scale (default: 128); -1: all of them",
    )  # fmt: skip
    group.add_argument("--symmetric", **switch, help="int2 to int8: no zero points (default: int8 only)")
    group.add_argument("--asymmetric", **switch | {"option": "symmetric", "value": False}, help="with zero points")
    group.add_argument("--load-in-4bit", **switch, help="bitsandbytes, 4 bits (its default)")
    group.add_argument("--load-in-8bit", **switch, help="bitsandbytes, LLM.int8")
    group.add_argument(
        "--bnb-4bit-quant-type", action=QuantizationOption, choices=("nf4", "fp4"), help="bitsandbytes (default: nf4)"
    )
    group.add_argument("--bnb-4bit-use-double-quant", **switch, help="bitsandbytes: quantize the scales too")
    group.add_argument(
        "--llm-int8-threshold", action=QuantizationOption, type=float, metavar="X",
        help="bitsandbytes, 8 bits: inputs of this size and above stay exact (default: 6)",
    )  # fmt: skip
    group.add_argument("--quantize-lm-head", **switch, help="the output head too (default: it stays dense)")


def engine_options(parser: argparse.ArgumentParser) -> None:
    """The options that size the engine."""
    group = parser.add_argument_group("engine")
    group.add_argument("--tokenizer-path", "--tokenizer", dest="tokenizer", metavar="T", help="default: the model's")
    group.add_argument("--skip-tokenizer-init", action="store_true", help="token ids in (JSON lines) and out")
    group.add_argument("--context-length", "--max-model-len", dest="max_model_len", type=int, metavar="N")
    group.add_argument(
        "--max-running-requests", "--max-num-seqs", dest="max_num_seqs", type=int, default=32, metavar="N"
    )
    group.add_argument(
        "--chunked-prefill-size", "--max-num-batched-tokens", dest="max_num_batched_tokens", type=int, metavar="N"
    )
    group.add_argument("--max-total-tokens", type=int, metavar="N", help="size of the KV cache in tokens")
    group.add_argument(
        "--mem-fraction-static", "--gpu-memory-utilization", dest="mem_fraction_static", type=float, metavar="F",
        help="most that the KV cache takes of the memory left by the weights (default: 0.5)",
    )  # fmt: skip
    group.add_argument("--kv-cache-memory", metavar="SIZE", help="size of the KV cache, e.g. 2GiB")
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        metavar="D",
        help="auto (FP8 if the checkpoint asks for it, else the model's), bf16, fp16, fp32, fp8_e4m3, int8 (default: auto)",
    )
    group.add_argument(
        "--disable-radix-cache", "--no-enable-prefix-caching", dest="enable_prefix_caching", action="store_false",
        help="never start from the keys and values of an earlier prompt",
    )  # fmt: skip
    group.add_argument("--enable-prefix-caching", action="store_true", help="the default")
    group.add_argument(
        "--disable-cuda-graph", "--enforce-eager", dest="disable_cuda_graph", action="store_true",
        help="let Python make every call of every decoding step (default: CUDA graphs, on a CPU recorded calls)",
    )  # fmt: skip
    group.add_argument(
        "--no-fuse", dest="fuse", action="store_false",
        help="multiply every linear layer by itself (default: q, k, v at once, gate and up at once)",
    )  # fmt: skip
    group.add_argument(
        "--no-native", dest="native", action="store_false",
        help="leave everything but quantized layers and attention to torch, and on a CPU to Python",
    )  # fmt: skip


def queue_options(parser: argparse.ArgumentParser) -> None:
    """The options that bound what waits."""
    group = parser.add_argument_group("queue")
    group.add_argument(
        "--max-queued-requests", "--max-num-queued-reqs", dest="max_queued_requests", type=int, default=512, metavar="N",
        help="more are answered 429 (default: 512)",
    )  # fmt: skip
    group.add_argument("--queue-timeout", type=float, default=300.0, metavar="S", help="longest wait (default: 300)")
    group.add_argument(
        "--request-timeout", type=float, default=3600.0, metavar="S", help="longest answer, its wait included"
    )
    group.add_argument(
        "--random-seed", "--seed", dest="seed", type=int, metavar="S", help="for requests without a seed"
    )


def server_options(parser: argparse.ArgumentParser) -> None:
    """The options of the HTTP server; their defaults are :class:`ServerOptions`'s."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", metavar="H", help="default: 127.0.0.1")
    group.add_argument("--port", type=int, metavar="P", help="default: 30000; 0 takes a free one")
    group.add_argument("--served-model-name", metavar="NAME", help="default: the model as it was given")
    group.add_argument("--api-key", metavar="KEY", help="asked for on every route but /health")
    group.add_argument("--api-key-file", metavar="FILE", help="one key a line; out of the process list")
    group.add_argument("--allowed-hosts", type=_names, metavar="H,H", help="default: loopback names when on loopback")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="with --ssl-certfile: serve https")
    group.add_argument("--ssl-certfile", metavar="FILE", help="PEM, with its chain")
    group.add_argument("--ssl-keyfile-password", metavar="P", help="of an encrypted key")
    group.add_argument("--ssl-ca-certs", metavar="FILE", help="who signs clients' certificates, for --ssl-cert-reqs")
    group.add_argument(
        "--ssl-cert-reqs", type=int, choices=(0, 1, 2), help="clients' certificates: 0 none, 1 optional, 2 required"
    )
    group.add_argument("--ssl-ciphers", metavar="LIST", help="in OpenSSL's spelling; default: OpenSSL's choice")
    group.add_argument(
        "--root-path",
        "--fastapi-root-path",
        dest="root_path",
        metavar="P",
        help="prefix that a proxy in front takes away",
    )
    group.add_argument(
        "--log-requests", "--enable-log-requests", dest="log_requests", action="store_true", default=None,
        help="a line a request, without its text",
    )  # fmt: skip
    group.add_argument("--max-body-bytes", type=int, metavar="N", help="default: 8 MiB")
    group.add_argument("--chat-template", metavar="FILE", help="instead of the tokenizer's own")
    group.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="how calls look: hermes, qwen25, qwen3_coder; default: known for the model",
    )
    group.add_argument(
        "--reasoning-parser", metavar="NAME", help="how thoughts look: qwen3, deepseek-r1; default: known for the model"
    )
    group.add_argument(
        "--sampling-defaults", choices=("model", "openai"), help="from generation_config.json (default), or plain"
    )
    group.add_argument(
        "--generation-config", dest="sampling_defaults", type=_generation_config, metavar="auto|vllm",
        help="vLLM's spelling of --sampling-defaults model|openai",
    )  # fmt: skip
    group.add_argument("--watchdog-timeout", type=float, metavar="S", help="exit if a step hangs; default: 300")
    group.add_argument("--shutdown-timeout", type=float, metavar="S", help="for answers that run; default: 30")
    group.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default: info")
    group.add_argument(
        "--model-impl", choices=("auto", "transformers"), help="whose modelling code; there is only Transformers'"
    )
    foreign_options(parser)


def _load_format(text: str) -> str:
    known = {
        "dummy": "the weights that are served are those that were checked; write a small checkpoint to try things out",
        "bitsandbytes": "it is found out from the checkpoint, or asked for by --quantization bitsandbytes",
        "gguf": "GGUF is refused by design; use the checkpoint that it was made of",
    }
    if text not in ("auto", "safetensors"):
        why = known.get(text, "only safetensors are; pickled files (pt, bin) could run code")
        raise argparse.ArgumentTypeError(f"{text!r} is not read: {why}")
    return text


def _generation_config(text: str) -> str:
    known = {"auto": "model", "vllm": "openai"}
    if text not in known:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not read: auto takes the model's generation_config.json, vllm none"
        )
    return known[text]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def pick(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Like :func:`pick`, without what was left open."""
    return {name: value for name, value in pick(arguments, names).items() if value is not None}
