"""The ``relinear`` command: a thin face over :class:`runtime.LLM` and :func:`runtime.inspect`.

Answers go to standard output, everything about them (report, progress, errors) to standard error. Heavy modules are
imported by the subcommands, so ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.bench import add_parsers as add_bench_parsers
from runtime.chat import chat
from runtime.errors import Error, InvalidRequest
from runtime.evaluation.command import add_parsers as add_eval_parsers
from runtime.options import (
    ENGINE,
    LOADING,
    QUEUE,
    SERVER,
    engine_options,
    given,
    loading_options,
    pick,
    queue_options,
    server_options,
)
from runtime.parser import Parser, with_config_file


def build_parser() -> Parser:
    parser = Parser(prog="relinear", description="A quantization-focused LLM runtime.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _generate_parser(commands.add_parser("generate", help="complete prompts"))
    _serve_parser(commands.add_parser("serve", help="serve over HTTP, as OpenAI and SGLang do"))
    _inspect_parser(commands.add_parser("inspect", help="show what loading would do; reads no weights"))
    _verify_parser(commands.add_parser("verify", help="is what this machine computes what the checkpoint says?"))
    _chat_parser(commands.add_parser("chat", help="talk to a model in the terminal"))
    add_bench_parsers(commands.add_parser("bench", help="measure speed, as SGLang does"))
    add_eval_parsers(commands.add_parser("eval", help="measure what quantizing lost; gates for CI"))
    commands.add_parser("env", help="what to paste into an issue").set_defaults(run=_show_environment)
    return parser


def _generate_parser(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=generate)
    parser.add_argument(
        "--model-path", "--model", required=True, metavar="M", help="folder, Hub repository, demo or demo-bf16"
    )
    loading_options(parser)
    engine_options(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="one prompt a line, or JSON lines with 'prompt' or 'input_ids'; - is standard input, also read without --prompt",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens", "--max-tokens", dest="max_tokens", type=int, metavar="N", help="default: 128, or what fits"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P")
    group.add_argument("--top-k", type=int, default=0, metavar="K")
    group.add_argument("--min-p", type=float, default=0.0, metavar="M")
    group.add_argument("--seed", type=int, metavar="S")
    group.add_argument("--stop", action="append", default=[], metavar="STR", help="may be repeated")
    group.add_argument("--ignore-eos", action="store_true")
    group.add_argument("--n", type=int, default=1, help="samples a prompt")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON line a prompt")
    group.add_argument("--stream", action="store_true", help="show text as it comes, one prompt after the other")
    group.add_argument("--quiet", action="store_true", help="no report and no progress bar")


def _inspect_parser(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=inspect)
    parser.add_argument("model", metavar="M", help="folder, Hub repository, demo or demo-bf16")
    loading_options(parser)
    parser.add_argument("--json", action="store_true", help="every module, as JSON")


def _verify_parser(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=verify)
    parser.add_argument("model", metavar="M", help="folder, Hub repository, demo or demo-bf16")
    loading_options(parser)
    parser.add_argument(
        "--against-transformers",
        action="store_true",
        help="run the whole model against dequantized weights, in float32",
    )
    parser.add_argument("--text", metavar="FILE", help="what to run it on; default: a bundled text")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="how much of it (default: 512)")
    parser.add_argument("--json", action="store_true", help="the report as JSON")


DEFAULT_NEW_TOKENS = 128


def _serve_parser(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=serve)
    parser.add_argument("model_argument", nargs="?", metavar="M", help="the same as --model-path")
    parser.add_argument("--model-path", "--model", metavar="M", help="folder, Hub repository, demo or demo-bf16")
    parser.add_argument("--config", metavar="FILE", help="YAML: flags without dashes as keys; the command line wins")
    loading_options(parser)
    engine_options(parser)
    queue_options(parser)
    server_options(parser)


def _chat_parser(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=chat)
    parser.add_argument("--model-path", "--model", required=True, metavar="M")
    loading_options(parser)
    engine_options(parser)
    group = parser.add_argument_group("conversation")
    group.add_argument("--chat-template", metavar="FILE", help="instead of the tokenizer's own")
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group.add_argument("--temperature", type=float, metavar="T", help="default: the model's")
    group.add_argument("--top-p", type=float, metavar="P", help="default: the model's")
    group.add_argument("--max-new-tokens", "--max-tokens", dest="max_tokens", type=int, metavar="N")
    group.add_argument("--quiet", action="store_true", help="no report")


def _show_environment(arguments: argparse.Namespace) -> int:
    from runtime.environment import show

    return show(arguments)


SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos", "n")


def generate(arguments: argparse.Namespace) -> int:
    from runtime.request import SamplingParams

    if arguments.stream and (arguments.json or arguments.n > 1):
        raise InvalidRequest("--stream shows one answer as it comes; leave out --json and --n.")
    params = SamplingParams(**pick(arguments, SAMPLING))
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)

    from runtime.llm import LLM

    llm = LLM(arguments.model_path, **pick(arguments, LOADING + ENGINE))
    if not arguments.quiet:
        print(llm.report + "\n", file=sys.stderr)
    each = [params if params.max_tokens is not None else _default_length(llm, prompt, params) for prompt in prompts]
    if arguments.stream:
        for prompt, settings in zip(prompts, each, strict=True):
            _print_stream(llm, prompt, settings)
        return 0
    failed = []
    many = len(prompts) * arguments.n > 1
    for output in llm.completed(prompts, each, use_tqdm=not arguments.quiet and sys.stderr.isatty()):
        if arguments.json:
            print(json.dumps(dataclasses.asdict(output), ensure_ascii=False), flush=True)
        else:
            for sample in output.outputs:
                answer = sample.text if llm.get_tokenizer() else " ".join(map(str, sample.token_ids))
                print(f"{output.prompt or ''}{answer}" + "\n---" * many, flush=True)
        failed += [sample.error for sample in output.outputs if sample.error]
    if failed:
        print(f"relinear: {len(failed)} answers failed: {failed[0]}", file=sys.stderr)
    return 1 if failed else 0


def _default_length(llm: Any, prompt: str | list[int], params: Any) -> Any:
    """128 new tokens, or as many as fit behind the prompt."""
    room = llm.engine.max_model_len - len(llm.engine.encode(prompt))
    return dataclasses.replace(params, max_tokens=max(1, min(DEFAULT_NEW_TOKENS, room)))


def _print_stream(llm: Any, prompt: str | list[int], params: Any) -> None:
    print(prompt if isinstance(prompt, str) else "", end="", flush=True)
    for _, delta in llm.stream([prompt], params):
        piece = delta.text if llm.get_tokenizer() else "".join(f"{token} " for token in delta.token_ids)
        print(piece, end="", flush=True)
        if delta.error:
            raise Error(delta.error)
    print("\n---", flush=True)


def serve(arguments: argparse.Namespace) -> int:
    models = {arguments.model_argument, arguments.model_path} - {None}
    if len(models) != 1:
        raise InvalidRequest("exactly one model is needed: --model-path M.")
    try:
        import fastapi  # noqa: F401 - to say what is missing before anything is loaded
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise Error(f"serving needs the extra 'serve' ({error}): pip install 'relinear[serve]'.") from error
    from runtime.config import EngineConfig
    from runtime.server.options import ServerOptions
    from runtime.server.process import serve as run

    config = EngineConfig(models.pop(), **given(arguments, LOADING + ENGINE + QUEUE))
    return run(config, ServerOptions(**given(arguments, SERVER)))


def inspect(arguments: argparse.Namespace) -> int:
    from runtime.inspection import inspect as look

    found = look(arguments.model, **pick(arguments, LOADING))
    print(json.dumps(found.data(), indent=2, ensure_ascii=False) if arguments.json else found)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from runtime.verify import verify as run

    options = pick(arguments, LOADING)
    found = run(
        arguments.model, against_transformers=arguments.against_transformers, text=arguments.text, tokens=arguments.tokens,
        **options,
    )  # fmt: skip
    print(json.dumps(found.data(), indent=2, ensure_ascii=False) if arguments.json else found)
    return 0 if found.passed else 1


def read_prompts(texts: Sequence[str], file: str | None) -> list[str | list[int]]:
    """Prompts of the command line and then of a file or of standard input. Raises :class:`InvalidRequest`."""
    prompts: list[str | list[int]] = list(texts)
    if file is None and not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise InvalidRequest("no prompt: give --prompt TEXT, --prompt-file FILE, or text on standard input.")
        file = "-"
    if file is not None:
        try:
            content = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"--prompt-file {file}: {error}") from error
        prompts += _parse_prompts(content)
    if not prompts:
        raise InvalidRequest("no prompt: the input is empty.")
    return prompts


def _parse_prompts(content: str) -> list[str | list[int]]:
    """JSON lines if the first line is a JSON object, else every line is a prompt; empty lines are left out."""
    lines = [
        (place, line) for place, line in enumerate(content.removeprefix("\ufeff").split("\n"), start=1) if line.strip()
    ]
    if not lines or not _is_object(lines[0][1]):
        return [line.removesuffix("\r") for _, line in lines]
    return [_parse_entry(line, place) for place, line in lines]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parse_entry(line: str, place: int) -> str | list[int]:
    if not _is_object(line):
        raise InvalidRequest(f"line {place} is not a JSON object, as the first line is: {line[:60]!r}.")
    entry = {key: value for key, value in json.loads(line).items() if value is not None}
    prompt = entry.get("prompt", entry.get("input_ids"))
    if set(entry) - {"prompt", "input_ids"} or len(entry) != 1 or not isinstance(prompt, str | list):
        raise InvalidRequest(
            f"line {place}: a prompt is an object with either 'prompt' (text) or 'input_ids' (a list of token ids), "
            f"not {', '.join(map(repr, entry)) or 'nothing'}. Sampling is set on the command line."
        )
    return prompt


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 gets escapes, not a crash
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    parser = build_parser()
    try:
        arguments = parser.parse_args(with_config_file(sys.argv[1:] if argv is None else argv, parser))
        return int(arguments.run(arguments))
    except Error as error:
        print(f"relinear: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    sys.exit(main())
