"""Clients of other projects against a real server: lm-eval, SGLang's own serving benchmark and GuideLLM. Each is left out where
it is not installed:

    pip install -c constraints.txt 'lm-eval[api]'
    python -m venv clients && clients/bin/pip install 'sglang==0.4.6.post5' transformers pandas    # the client, not the engine
    python -m venv clients && clients/bin/pip install -c constraints.txt guidellm

The last two may have an environment of their own: RELINEAR_TEST_CLIENTS names its Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoint import locate
from tests.runtime.served import Served

CLIENTS = os.environ.get("RELINEAR_TEST_CLIENTS", sys.executable)
REQUESTS = 16
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None or find_spec("tenacity") is None, reason="lm-eval[api] is not installed"
)
FILES = {"tokenizer": str(locate("demo")), "tokenizer_backend": "huggingface"}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with Served() as served:
        yield served
        served.until_idle()
        assert served.stop() == 0, served.log
        assert "Traceback" not in served.log


# lm-eval


def client_of(server: Served, **options: Any) -> Any:
    """lm-eval's client. Given nothing but an address, it tokenises with the server's own routes."""
    from lm_eval.api.registry import get_model

    url = f"{server.url}/v1/completions"
    return get_model("local-completions")(model="demo", base_url=url, num_concurrent=1, **options)


@pytest.fixture(scope="module")
def served_model(server: Served) -> Any:
    return client_of(server, **FILES, add_bos_token=True)  # as lm-eval's own Transformers model does


@pytest.fixture(scope="module")
def offline_model() -> Any:
    from runtime import LLM
    from runtime.evaluation.harness import EngineLM

    return EngineLM(LLM("demo", dtype="float32"))


@needs_lm_eval
def test_lm_eval_scores_what_is_served_as_what_is_not(served_model: Any, offline_model: Any) -> None:
    from lm_eval.api.instance import Instance

    pairs = [
        ("def add(a, b):\n", "    return a + b"),
        ("import os", ", sys"),
        ("x = [", "1, 2, 3]"),
        ("class A:", "\n"),
    ]
    asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    served, offline = served_model.loglikelihood(asked), offline_model.loglikelihood(asked)
    assert [score for score, _ in served] == pytest.approx([score for score, _ in offline], abs=1e-4)
    assert [greedy for _, greedy in served] == [greedy for _, greedy in offline]
    assert len({round(score, 3) for score, _ in served}) == len(pairs)


@needs_lm_eval
def test_lm_eval_scores_whole_texts(server: Served, offline_model: Any) -> None:
    from lm_eval.api.instance import Instance

    served = client_of(server, **FILES, custom_prefix_token_id=offline_model._start)
    texts = [Instance("loglikelihood_rolling", {}, ("import os\n\n\ndef main():\n    return os\n",), 0)]
    expected = offline_model.loglikelihood_rolling(texts)
    assert served.loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-4)


@needs_lm_eval
def test_lm_eval_needs_no_files_of_its_own(server: Served) -> None:
    remote = client_of(server)
    assert remote.tokenizer_backend == "remote"
    local = client_of(server, **FILES)
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, ("def add(a, b):\n", "    return a + b"), 0)]
    [(score, greedy)], [(expected, also_greedy)] = remote.loglikelihood(asked), local.loglikelihood(asked)
    assert (score, greedy) == (pytest.approx(expected, abs=1e-6), also_greedy)


@needs_lm_eval
def test_a_local_task_of_lm_eval(served_model: Any, offline_model: Any) -> None:
    from lm_eval import simple_evaluate

    from runtime.evaluation.local_tasks import task_config

    found = []
    for model in (served_model, offline_model):
        result = simple_evaluate(model, tasks=[task_config("relinear_brackets")], limit=6, bootstrap_iters=0)
        samples = result["samples"]["relinear_brackets"]
        scores = [float(response[0]) for sample in samples for response in sample["filtered_resps"]]
        found.append((scores, [sample["acc"] for sample in samples]))
    assert len(found[0][0]) > 18
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert found[0][1] == found[1][1]
    assert 0 < sum(found[0][1]) <= 6


@needs_lm_eval
def test_lm_eval_generates_until_a_stop(served_model: Any, offline_model: Any) -> None:
    from lm_eval.api.instance import Instance

    options = {"until": ["\n\n", "return"], "max_gen_toks": 24, "do_sample": False}
    asked = [
        Instance("generate_until", {}, (prompt, dict(options)), place)
        for place, prompt in enumerate(("def main():\n", "class Stack:\n    def push(self, item):\n"))
    ]
    assert served_model.generate_until(asked) == offline_model.generate_until(asked)


# Serving benchmarks


def needs(module: str) -> Any:
    """Leave a test out before a server is started for it."""
    return pytest.mark.skipif(sys.executable == CLIENTS and find_spec(module) is None, reason=f"no {module}")


def client(*words: str, module: str) -> subprocess.CompletedProcess[str]:
    """Run another project's module in the Python of :data:`CLIENTS`; the test is left out if it is not there."""
    find = f"import importlib.util as u, sys; sys.exit(u.find_spec({module.partition('.')[0]!r}) is None)"
    if subprocess.run([CLIENTS, "-c", find]).returncode:
        pytest.skip(f"{module} is not installed")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [CLIENTS, "-m", module, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)


@needs("sglang")
@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "vllm"])
def test_sglangs_own_benchmark(server: Served, backend: str, tmp_path: Path) -> None:
    file = tmp_path / "result.jsonl"
    load = [
        "--num-prompts",
        str(REQUESTS),
        "--random-input-len",
        "32",
        "--random-output-len",
        "12",
        "--max-concurrency",
        "4",
    ]
    done = client(
        "--backend", backend, "--base-url", server.url, "--model", "demo", "--tokenizer", str(locate("demo")),
        "--dataset-name", "random-ids", "--output-file", str(file), *load,
        module="sglang.bench_serving",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(file.read_text())
    assert result["completed"] == REQUESTS
    assert result["total_output_tokens"] > REQUESTS
    assert 0 < result["median_ttft_ms"] <= result["median_e2e_latency_ms"]


@needs("guidellm")
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(server: Served, route: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = client(
        "run", "--backend", f"kind=openai_http,target={server.url},model=demo,request_format={route}",
        "--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--tokenizer", f"kind=hf_auto,model={locate('demo')}", "--output", f"kind=json,path={file}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=12", "--disable-progress",
        module="guidellm",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    requests = json.loads(file.read_text())["benchmarks"][0]["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (REQUESTS, 0)
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {12}
