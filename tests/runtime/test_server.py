"""A real server and the official client: served is what ``LLM`` says, streamed is what is not streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import openai
import pytest

from runtime import LLM, SamplingParams
from runtime.cli import main
from tests.runtime.served import CHAT_TEMPLATE, Served

METRICS = {
    "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc weights_bytes quantized_modules",
    "counter": "prefix_cache_queries_total prefix_cache_hits_total prompt_tokens_total generation_tokens_total "
    "request_success_total num_preemptions_total requests_rejected_total aborted_total nan_logits_total",
    "histogram": "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds "
    "request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds",
}
"""vLLM's names, and ours."""
PROMPTS = ["def main():\n", "import os\n", "class Stack:\n    def push(self, item):\n"]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with Served() as served:
        yield served
        assert served.stop() == 0


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", dtype="float32")


@pytest.fixture(autouse=True)
def nothing_is_left(server: Served) -> Iterator[None]:
    yield
    server.until_idle()


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_completions_are_those_of_the_python_api(client: openai.OpenAI, llm: LLM) -> None:
    served = client.completions.create(model="demo", prompt=PROMPTS, max_tokens=24, temperature=0, logprobs=2)
    offline = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24, logprobs=2))
    assert [choice.index for choice in served.choices] == [0, 1, 2]
    for choice, output in zip(served.choices, offline, strict=True):
        sample = output.outputs[0]
        assert (choice.text, choice.finish_reason) == (sample.text, sample.finish_reason)
        assert choice.logprobs is not None
        assert sample.logprobs is not None
        expected = [row[token].logprob for token, row in zip(sample.token_ids, sample.logprobs, strict=True)]
        assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-5)
    assert served.usage is not None
    assert served.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in offline)
    assert served.usage.completion_tokens == sum(len(output.outputs[0].token_ids) for output in offline)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3, "seed": 5, "temperature": 1.2},
        {"stop": ["self", "self.", "ret"]},
        {"logit_bias": {"31": 100}},
        {"temperature": 2.0, "seed": 11, "max_tokens": 60, "extra_body": {"skip_special_tokens": False}},
    ],
)
def test_streamed_is_what_is_not_streamed(client: openai.OpenAI, options: dict[str, Any]) -> None:
    options = {"model": "demo", "prompt": PROMPTS[:2], "max_tokens": 30, "temperature": 0, **options}
    whole = client.completions.create(**options)
    texts, reasons, usage = {}, {}, None
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [(texts[choice.index], reasons[choice.index]) for choice in whole.choices] == [
        (choice.text, choice.finish_reason) for choice in whole.choices
    ]
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_chat_with_log_probabilities(client: openai.OpenAI, llm: LLM) -> None:
    options: dict[str, Any] = {
        "model": "demo",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "import "}, {"type": "text", "text": "os"}]}
        ],
        "max_completion_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**options).choices[0]
    template = {"chat_template": CHAT_TEMPLATE}
    sample = llm.chat(
        [{"role": "user", "content": "import os"}], SamplingParams(temperature=0, max_tokens=12), **template
    )
    assert whole.message.content == sample.outputs[0].text
    assert whole.logprobs is not None
    assert whole.logprobs.content is not None
    assert [len(row.top_logprobs) for row in whole.logprobs.content] == [2] * len(sample.outputs[0].token_ids)
    assert all(row.logprob == max(best.logprob for best in row.top_logprobs) for row in whole.logprobs.content)
    text, rows = "", []
    for place, chunk in enumerate(client.chat.completions.create(stream=True, **options)):
        delta = chunk.choices[0].delta
        assert (delta.role == "assistant") == (place == 0)
        text += delta.content or ""
        rows += (chunk.choices[0].logprobs.content or []) if chunk.choices[0].logprobs else []
    assert text == whole.message.content
    assert [row.token for row in rows] == [row.token for row in whole.logprobs.content]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt_as_lm_eval_wants(client: openai.OpenAI, llm: LLM, max_tokens: int) -> None:
    prompt = "def add(a, b):\n    return a + b\n"
    ids = llm.engine.encode(prompt)
    served = client.completions.create(
        model="demo", prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
    )
    logprobs = served.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == len(ids) + max_tokens
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(llm.score(ids).logprobs[1:], abs=1e-5)
    for name, best in zip((logprobs.tokens or [])[1:], logprobs.top_logprobs[1:], strict=True):
        assert name in best, "lm-eval looks the token up to see whether it was the likeliest"


def test_no_answer_ends_before_min_tokens(server: Served, llm: LLM) -> None:
    end, newline = llm.get_tokenizer().eos_token_id, llm.engine.encode("\n")[-1]
    biased = {"logit_bias": {str(end): 100, str(newline): 99}, "stop_token_ids": [newline]}
    body = {
        "input_ids": [5, 6],
        "sampling_params": {"min_new_tokens": 3, "max_new_tokens": 9, "temperature": 0, **biased},
    }
    ids = server.post("/generate", body).json()["output_ids"]
    assert [token in (end, newline) for token in ids] == [False, False, False, True]


def test_every_sample_has_the_scores_of_its_prompt(server: Served, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "logprobs": 1, "max_tokens": 3, "temperature": 1.5, "seed": 2, "n": 2}
    choices = client.completions.create(prompt=PROMPTS[:2], echo=True, **options).choices
    for place, choice in enumerate(choices):
        found = choice.logprobs
        assert found is not None
        lists = (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)
        tokens, scores, _, offsets = (each or [] for each in lists)
        assert len({len(each or []) for each in lists}) == 1
        assert [choice.text[at:].startswith(str(token)) for at, token in zip(offsets, tokens, strict=True)][1:] == [
            True
        ] * (len(tokens) - 1)
        first = choices[place // 2 * 2].logprobs
        assert first is not None
        assert scores[:-3] == (first.token_logprobs or [])[:-3]
    sampling = {"n": 2, "max_new_tokens": 3, "temperature": 1.5}
    body = {"text": PROMPTS[:2], "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    rows = [row["meta_info"] for row in server.post("/generate", body).json()]
    for row, shared in zip(rows, (rows[0], rows[0], rows[2], rows[2]), strict=True):
        assert len(row["input_token_logprobs"]) == row["prompt_tokens"] == len(row["input_top_logprobs"])
        assert row["input_token_logprobs"] == shared["input_token_logprobs"]


def test_generate_as_sglang_streams_it(server: Served, llm: LLM) -> None:
    body = {"text": PROMPTS[0], "sampling_params": {"max_new_tokens": 10, "temperature": 0}, "return_logprob": True}
    whole = server.post("/generate", body).json()
    offline = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=10))[0]
    assert (whole["text"], whole["output_ids"]) == (offline.outputs[0].text, offline.outputs[0].token_ids)
    assert whole["meta_info"]["finish_reason"] == {"type": "length", "length": 10}
    assert len(whole["meta_info"]["output_token_logprobs"]) == 10
    with httpx.stream("POST", f"{server.url}/generate", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    rows = [json.loads(line) for line in lines[:-1]]
    assert all(later["text"].startswith(earlier["text"]) for earlier, later in pairwise(rows))
    assert rows[-1]["text"] == whole["text"]
    named = {"text": PROMPTS[:2], "rid": ["a", "b"], "sampling_params": {"max_new_tokens": 2}}
    assert [row["meta_info"]["id"] for row in server.post("/generate", named).json()] == ["a", "b"]
    both = server.post(
        "/generate", {"input_ids": [llm.engine.encode(p) for p in PROMPTS[:2]], "sampling_params": {"n": 2}}
    ).json()
    assert len(both) == 4


def test_a_repeated_prompt_is_cached_and_the_usage_says_so(client: openai.OpenAI, server: Served) -> None:
    options: dict[str, Any] = {"model": "demo", "prompt": "x = 1\n" * 40, "max_tokens": 4, "temperature": 0}
    first = client.completions.create(**options)
    second = client.completions.create(**options)
    salted = client.completions.create(**options, extra_body={"cache_salt": "other"})
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second, salted)]  # type: ignore
    assert (cached[0], cached[2]) == (0, 0)
    assert cached[1] >= 64
    assert first.choices[0].text == second.choices[0].text == salted.choices[0].text
    assert server.metric("prefix_cache_hits_total") >= 64
    assert server.post("/flush_cache", {}).json() == {"success": True}
    again = client.completions.create(**options)
    assert again.usage.prompt_tokens_details.cached_tokens == 0  # type: ignore[union-attr]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def test_structured_outputs(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "demo",
        "prompt": "data = ",
        "max_tokens": 80,
        "temperature": 1,
        "seed": 3,
        "n": 2,
    }
    schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    for choice in client.completions.create(**options, extra_body={"response_format": schema}).choices:
        assert set(json.loads(choice.text)) == {"name", "size"}
    for form, conforms in (
        ({"regex": r"[0-9]{3}-[a-f]{2}"}, lambda text: len(text) == 6 and text[3] == "-"),
        ({"choice": ["left", "right\n"]}, lambda text: text in ("left", "right\n")),
        ({"grammar": 'start: "a" ("b" | "c") "d"'}, lambda text: text in ("abd", "acd")),
        ({"grammar": 'root ::= "a" end\n\nend ::= ("b" | "c") "d"'}, lambda text: text in ("abd", "acd")),
    ):
        answer = client.completions.create(**options, extra_body={"structured_outputs": form})
        assert all(conforms(choice.text) for choice in answer.choices), (form, answer.choices)


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "[0-9"}, {"choice": []}, {"grammar": "start: missing"}, {"grammar": 'root ::= "a" ('}, {},
        {"json": {"type": 5}}, {"json": {"$ref": "#/nowhere"}}, {"regex": "a", "choice": ["b"]}, {"regex": "x" * 100_000},
    ],
)  # fmt: skip
def test_a_bad_form_is_that_requests_400(server: Served, form: dict[str, Any]) -> None:
    done = server.post("/v1/completions", {"prompt": "x", "structured_outputs": form, "max_tokens": 2})
    if form:
        assert done.status_code == 400, done.text
        assert "structured_outputs" in done.text or "one form" in done.text
    else:
        assert done.status_code == 200


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here") as missing:
        client.completions.create(model="gpt-5", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="asks for 5000 more, but the longest sequence is 1024") as refused:
        client.completions.create(model="demo", prompt="x", max_tokens=5000)
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(
        openai.BadRequestError,
        match="how this model writes calls is not known",
    ):
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    with pytest.raises(openai.NotFoundError, match="embeddings are not served"):
        client.embeddings.create(model="demo", input="x")
    assert [model.id for model in client.models.list()] == ["demo"]


def test_the_small_routes(server: Served, llm: LLM) -> None:
    tokens = server.post("/tokenize", {"prompt": PROMPTS[1]}).json()
    assert tokens["tokens"] == llm.engine.encode(PROMPTS[1])
    text = server.post("/detokenize", {"tokens": tokens["tokens"], "skip_special_tokens": True}).json()
    assert text["text"] == PROMPTS[1]
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/get_model_info").json()["quantization"] == "awq"
    for path in ("/health", "/ping", "/health_generate"):
        assert (server.get(path).json(), httpx.head(server.url + path).status_code) == ({"status": "ok"}, 200)
    assert "kernel" in server.get("/server_info").json()["report"]
    assert server.get("/server_info").json()["internal_states"][0]["running"] == 0
    assert server.get("/tokenizer_info").json()["eos_token"] == llm.get_tokenizer().eos_token
    assert server.get("/version").status_code == 200
    for name in ("time_to_first_token_seconds_count", "generation_tokens_total", "request_success_total"):
        assert server.metric(name) > 0
    exposed = server.get("/metrics").text
    for kind, names in METRICS.items():
        for name in names.split():
            assert f"# TYPE relinear:{name} {kind}\n" in exposed
    assert 'relinear:quantized_modules{bits="4",method="awq",model_name="demo"} 56.0' in exposed
    assert "sampling defaults" in server.log
    assert server.frozen > 100_000, "the libraries' objects"


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_the_serving_benchmark_drives_it(server: Served, backend: str, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    load = ["--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "5", "--max-concurrency", "1", "3"]
    plot = tmp_path / "load.svg"
    flags = ["--base-url", server.url, "--backend", backend, "--output-file", str(file), "--plot", str(plot)]
    assert main(["bench", "serving", *flags, *load]) == 0
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert [result["max_concurrency"] for result in results] == [1, 3]
    for result in results:
        assert (result["completed"], result["failed"]) == (6, 0)
        assert 0 < result["median_ttft_ms"] <= result["p99_e2e_ms"]
        assert 0 < result["median_tpot_ms"] <= result["p99_tpot_ms"]
        tokens = result["output_throughput"] * result["duration_s"]
        assert tokens == pytest.approx(6 * 5)
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
