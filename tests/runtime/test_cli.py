"""The command line as a user meets it: a process, its output and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.bench_load import make_load
from runtime.cli import build_parser, main, read_prompts
from runtime.errors import Error, InvalidRequest
from runtime.parser import with_config_file


def relinear(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime", *arguments]
    source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(command, capture_output=True, text=True, check=False, **source)


def test_generate_reports_on_stderr_and_answers_on_stdout() -> None:
    done = relinear(
        "generate", "--model-path", "demo", "--quantization", "awq", "--prompt", "def main():", "--max-new-tokens", "8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def main():")
    for fact in ("awq gemm, 4 bits, group 128", "kernel", "% of the", "kv cache", "tokens ("):
        assert fact in done.stderr


def test_prompts_from_standard_input_as_json_lines() -> None:
    lines = '{"prompt": "import os\\n"}\n{"input_ids": [520, 1218], "prompt": null}\n{"prompt": "a\u2028b"}\n'
    done = relinear("generate", "--model", "demo", "--json", "--quiet", "--max-tokens", "4", "--seed", "1", stdin=lines)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.rstrip("\n").split("\n")]
    assert [row["prompt"] for row in rows] == ["import os\n", None, "a\u2028b"]
    assert rows[1]["prompt_token_ids"] == [520, 1218]
    assert all(len(row["outputs"][0]["token_ids"]) <= 4 for row in rows)
    assert "kernel" not in done.stderr


def test_streaming_prints_the_same_text() -> None:
    common = ("generate", "--model-path", "demo", "--prompt", "class A:", "--quiet", "--max-new-tokens", "12")
    assert relinear(*common, "--stream").stdout.rstrip("-\n") == relinear(*common).stdout.rstrip("-\n")


def test_errors_are_one_line_and_status_one() -> None:
    done = relinear("generate", "--model-path", "demo-bf16", "--quantization", "awq", "--prompt", "x")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "it is not quantized" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect_reads_no_weights_and_names_every_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "demo", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    modules = {module["name"]: module for module in data["modules"]}
    assert modules["model.layers.3.mlp.up_proj"]["format"] == "awq"
    assert modules["model.layers.3.mlp.up_proj"]["bits"] == 4
    assert modules["model.layers.3.mlp.up_proj"]["group"] == 128
    assert modules["lm_head"]["format"] == "dense"
    assert data["unclaimed"] == data["missing"] == []
    assert 0 < data["weight_bytes"] < data["bf16_bytes"]
    assert main(["inspect", "demo"]) == 0
    text = capsys.readouterr().out
    assert "model.layers.{0-7}.mlp.up_proj" in text
    assert "load peak" in text


def test_an_unknown_flag_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for command, flag, meant in (
        ("generate", "--temprature", "Did you mean --temperature?"),
        ("serve", "--mem-fraction-statics", "Did you mean --mem-fraction-static?"),
        ("serve", "--temprature", "Did you mean --chat-template?"),  # --temperature is of another command
        (
            "serve",
            "--max-num-queued-token",
            "Did you mean --max-num-queued-reqs?",
        ),  # --max-num-queued-tokens is refused
    ):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--model-path", "demo", flag, "1"])
        assert stopped.value.code == 2
        assert meant in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--temperature", "-1"], ["--top-p", "0"], ["--n", "0"]])
def test_bad_sampling_values_fail_before_loading(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model-path", "/nonexistent", "--prompt", "x", *flag]) == 1
    assert flag[0].lstrip("-").replace("-", "_") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "why"),
    [("pt", "only safetensors are"), ("gguf", "by design"), ("bitsandbytes", "--quantization"), ("dummy", "checked")],
)
def test_a_load_format_that_is_not_read_says_why(form: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "demo", "--load-format", form])
    assert why in capsys.readouterr().err


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("first line\n\nform\ffeed and \u2028 stay\n{not json\n", encoding="utf-8")
    assert read_prompts(["zero"], str(file)) == ["zero", "first line", "form\ffeed and \u2028 stay", "{not json"]
    file.write_text('\ufeff{"prompt": "two\\nlines"}\n{"input_ids": [1, 2]}\n', encoding="utf-8")
    assert read_prompts([], str(file)) == ["two\nlines", [1, 2]]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"prompt": "trunc', r"line 2 is not a JSON object"),
        ('{"text": "wrong key"}', r"line 2: a prompt is an object with either 'prompt'.*'text'"),
        ('{"prompt": "x", "max_tokens": 3}', r"line 2: .*'max_tokens'.*command line"),
        ('{"prompt": 5}', "line 2"),
    ],
)
def test_json_lines_that_are_not_prompts(tmp_path: Path, second: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + second + "\n")
    with pytest.raises(InvalidRequest, match=message):
        read_prompts([], str(file))


def test_a_prompt_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"missing\.txt"):
        read_prompts([], str(tmp_path / "missing.txt"))


@pytest.mark.parametrize("flag", [["--json"], ["--n", "2"]])
def test_a_stream_shows_one_answer(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model-path", "demo", "--prompt", "x", "--stream", *flag]) == 1
    assert "leave out --json and --n" in capsys.readouterr().err


def test_a_long_prompt_gets_as_many_tokens_as_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"input_ids": [5] * 1020}) + "\n")
    assert (
        main(["generate", "--model-path", "demo", "--prompt-file", str(file), "--json", "--quiet", "--ignore-eos"]) == 0
    )
    assert len(json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]) == 4


def test_no_prompt_at_all() -> None:
    done = relinear("generate", "--model-path", "demo")
    assert done.returncode == 1
    assert "no prompt" in done.stderr


def test_help_is_quick_and_complete() -> None:
    code = "import sys; sys.argv = ['relinear', 'generate', '--help']\nfrom runtime.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for flag in ("--max-new-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--seed", "--stop", "--json"):
        assert flag in done.stdout


def test_a_configuration_file_gives_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        "model-path: demo\nport: 1\nmax_queued_requests: 7\ndisable-radix-cache: true\nallowed-hosts: [a, b]\n"
    )
    parser = build_parser()
    arguments = parser.parse_args(with_config_file(["serve", "--config", str(file), "--port", "2"], parser))
    assert (arguments.model_path, arguments.port, arguments.max_queued_requests) == ("demo", 2, 7)
    assert (arguments.enable_prefix_caching, arguments.allowed_hosts) == (False, ("a", "b"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 1", "'prot' is not a flag of serve. Did you mean port"),
        ("trust-remote-code: 3", "takes true or false, not 3"),
        ("port: true", "takes a value, not True"),
        ("- a", "must map flags to values, not be list"),
        ("{", "config"),
        ("config: x", "'config' is not a flag"),
    ],
)
def test_a_bad_configuration_file_says_what_is_wrong(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(content)
    assert main(["serve", "--config", str(file)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "exactly one model is needed"),
        (("demo", "--model-path", "demo-bf16"), "exactly one model is needed"),
        (("demo", "--api-key", ""), "--api-key is empty"),
        (("demo", "--api-key-file", "/nonexistent"), "--api-key-file"),
        (("demo", "--chat-template", "/nonexistent"), "--chat-template"),
        (("demo", "--ssl-keyfile", "/nonexistent"), "needs both --ssl-keyfile and --ssl-certfile"),
        (("demo", "--ssl-keyfile", "/nonexistent", "--ssl-certfile", "/nonexistent"), "No such file"),
        (("demo", "--queue-timeout", "-1"), "queue_timeout must be a positive number"),
        (("demo", "--port", "99999"), "Choose another port"),
        (("demo", "--max-body-bytes", "0"), "--max-body-bytes must be at least 1, not 0"),
        (("demo", "--watchdog-timeout", "0"), "--watchdog-timeout must be at least 1"),
        (("demo", "--shutdown-timeout", "nan"), "--shutdown-timeout must be at least 0, not nan"),
    ],
)
def test_a_server_that_cannot_start_says_why_at_once(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *flags]) == 1
    assert message in capsys.readouterr().err


def test_env_names_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in ("cpu", "memory", "torch", "transformers"))


def test_benchmarks_of_the_engine_append_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    common = ["--model-path", "demo", "--output-file", str(file)]
    load = ["--num-prompts", "3", "--random-input-len", "8", "--random-output-len", "4", "--random-range-ratio", "0.5"]
    assert main(["bench", "offline-throughput", *common, *load]) == 0
    assert main(["bench", "one-batch", *common, "--batch-size", "2", "3", "--input-len", "8", "--output-len", "3"]) == 0
    first, *batches = map(json.loads, file.read_text().splitlines())
    assert first["completed"] == 3
    assert first["output_throughput"] > 0
    assert [batch["batch_size"] for batch in batches] == [2, 3]
    assert all(batch["median_decode_step_ms"] > 0 for batch in batches)
    assert main(["bench", "serving", "--base-url", "http://127.0.0.1:1", *load]) == 1
    assert "no request was answered" in capsys.readouterr().err


def test_recorded_conversations_as_a_load(tmp_path: Path) -> None:
    file = tmp_path / "conversations.json"
    turns = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]
    rows = [{"conversations": turns}, {"conversations": turns[:1]}, {"conversation": turns}, {"conversations": []}]
    file.write_text(json.dumps(rows))
    flags = ["--dataset-name", "sharegpt", "--dataset-path", str(file), "--sharegpt-output-len", "7"]
    arguments = build_parser().parse_args(["bench", "serving", *flags])
    assert make_load(arguments, 10) == [("question", 7), ("question", 7)]
    random = build_parser().parse_args(["bench", "serving"])
    assert make_load(random, 10, run=1) != make_load(random, 10) == make_load(random, 10)
    for content in ("[]", "{", "5", json.dumps(rows[1:2])):
        file.write_text(content)
        with pytest.raises(Error, match="--dataset-path"):
            make_load(arguments, 10)
    with pytest.raises(Error, match="needs --dataset-path"):
        make_load(build_parser().parse_args(["bench", "serving", "--dataset-name", "sharegpt"]), 10)


def test_a_conversation_is_remembered(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    flags = ("--chat-template", str(template), "--max-new-tokens", "3", "--temperature", "0", "--quiet")
    done = relinear("chat", "--model-path", "demo", *flags, stdin="import os\nimport re\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2
    refused = relinear("chat", "--model-path", "demo", "--quiet", stdin="x\n")
    assert "no chat template: use generate, or give --chat-template" in refused.stderr
