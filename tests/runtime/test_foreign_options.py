"""Flags that SGLang's and vLLM's users bring along: each is one of ours, or says what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.cli import build_parser
from runtime.foreign_options import ALWAYS, FIXED, REFUSED
from runtime.parser import with_config_file

TAKEN = """
--model-path m|--model m|--model-impl transformers|--tokenizer-path t|--tokenizer t|--tokenizer-mode auto|--skip-tokenizer-init
--trust-remote-code|--revision main|--load-format safetensors|--quantization awq|-q awq|--kv-cache-dtype fp8_e4m3|--dtype half
--device cpu|--context-length 99|--max-model-len 99|--mem-fraction-static 0.4|--gpu-memory-utilization 0.4|--max-total-tokens 99
--kv-cache-memory 2GiB|--max-running-requests 9|--max-num-seqs 9|--chunked-prefill-size 99|--max-num-batched-tokens 99
--max-queued-requests 9|--max-num-queued-reqs 9|--schedule-policy fcfs|--disable-radix-cache|--enable-prefix-caching
--no-enable-prefix-caching|--host h|--port 1|--api-key k|--api-key-file f|--served-model-name n|--fastapi-root-path /p
--root-path /p|--log-level info|--ssl-keyfile f|--ssl-certfile f|--ssl-ca-certs f|--ssl-cert-reqs 2|--ssl-keyfile-password p
--ssl-ciphers HIGH|--chat-template f|--tool-call-parser hermes|--reasoning-parser qwen3|--enable-auto-tool-choice
--sampling-defaults openai|--generation-config vllm|--grammar-backend llguidance|--enable-metrics|--log-requests
--enable-log-requests|--log-requests-level 1|--log-requests-format text|--watchdog-timeout 9|--shutdown-timeout 9|--tp-size 1
--tensor-parallel-size 1|-tp 1|--dp-size 1|--pp-size 1|--nnodes 1|--node-rank 0|--random-seed 1|--seed 1|--config f
--skip-server-warmup|--enforce-eager|--disable-cuda-graph|--attention-backend cpu
"""
SAID_NO = """
--model-impl sglang|--tokenizer-mode slow|--load-format pt|--load-format dummy|--schedule-policy lpm|--grammar-backend xgrammar
--log-requests-level 3|--log-requests-format json|--tp-size 2|-tp 2|--dp-size 2|--pp-size 2|--nnodes 2|--admin-api-key k
--max-prefill-tokens 99|--max-num-queued-tokens 9|--download-dir d|--model-checksum|--hf-chat-template-name n
--structured-outputs-config {}|--log-level-http info|--decode-log-interval 40|--enable-trace|--crash-dump-folder d
--soft-watchdog-timeout 9|--dist-init-addr a|--enable-deterministic-inference|--allowed-origins *|--generation-config folder
--enable-lora|--speculative-algorithm EAGLE|--enable-ssl-refresh|--enable-custom-logit-processor|--allow-credentials
--cpu-offload-gb 4|--tp 2|--max-logprobs 9|--override-generation-config {}|--incremental-streaming-output|--page-size 64
"""


def rows(text: str) -> list[list[str]]:
    return [row.split() for row in text.strip().replace("\n", "|").split("|")]


@pytest.mark.parametrize("flag", rows(TAKEN), ids=" ".join)
def test_a_flag_that_is_taken(flag: list[str]) -> None:
    build_parser().parse_args(["serve", *flag])


@pytest.mark.parametrize("flag", rows(SAID_NO), ids=" ".join)
def test_a_flag_that_is_not_says_why(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["serve", *flag])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert flag[0] in said
    assert any(word in said for word in ("cannot be served", "is not read", "invalid choice")), said
    assert "unrecognized" not in said


def test_every_flag_that_is_refused_is_in_these_lists() -> None:
    named = {row[0] for row in rows(TAKEN) + rows(SAID_NO)}
    assert not [flags for flags in (*FIXED, *REFUSED) if not named & set(flags)]


def test_they_leave_nothing_behind_and_are_not_in_the_help() -> None:
    parser = build_parser()
    bare = parser.parse_args(["serve", "m"])
    assert vars(parser.parse_args(["serve", "m", "--tp-size", "1", "--schedule-policy", "fcfs"])) == vars(bare)
    assert parser.parse_args(["serve", "m", "--generation-config", "vllm"]).sampling_defaults == "openai"
    [serve] = [a.choices["serve"] for a in parser._actions if hasattr(a, "choices") and a.choices]
    assert not [flag for flag in ALWAYS if flag in serve.format_help()]


def test_they_may_stand_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: demo\ntp-size: 2\nenable-metrics: true\n")
    parser = build_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(with_config_file(["serve", "--config", str(file)], parser))
    assert "--tp-size cannot be served (only 1): one model on one device" in capsys.readouterr().err
