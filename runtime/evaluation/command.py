"""``relinear eval``: what was lost by quantizing, in four questions.

diff    how far a candidate's distributions are from its reference's
ppl     perplexity, by a recipe that is named
tasks   scores through lm-eval, and which answers changed
gate    the same as a baseline file says? The exit status is for CI: 0 yes, 1 no, 2 the question was wrong
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from runtime.errors import Error, InvalidRequest
from runtime.options import LOADING, loading_options, pick
from runtime.parser import Parser

ON_PAGES = ("kv_cache_dtype",)
RECIPES = ("bits-per-byte", "wikitext-2048", "llama.cpp-512")


def add_parsers(parser: Parser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    diff = kinds.add_parser("diff", help="KL divergence, top-1 agreement and more against a reference")
    diff.set_defaults(run=show_difference)
    diff.add_argument("reference", metavar="REFERENCE", help="folder, Hub repository, demo or demo-bf16")
    diff.add_argument(
        "candidate",
        metavar="CANDIDATE",
        nargs="?",
        help="the same; left out: the reference with the options given here",
    )
    _text_options(diff, needed=True)
    diff.add_argument(
        "--no-layers", dest="layers", action="store_false", help="do not measure the error of every layer"
    )
    diff.add_argument("--plot", metavar="FILE.svg", help="histogram of KL, KL by position, error by layer")
    ppl = kinds.add_parser("ppl", help="perplexity by a named recipe")
    ppl.set_defaults(run=show_perplexity)
    ppl.add_argument("model", metavar="M", help="folder, Hub repository, demo or demo-bf16")
    ppl.add_argument("--recipe", choices=RECIPES, default=RECIPES[0], help=f"default: {RECIPES[0]}")
    ppl.add_argument(
        "--text", required=True, metavar="T", help="file or folder, UTF-8; demo: the bundled held-out text"
    )
    ppl.add_argument("--tokens", type=int, metavar="N", help="tokens to score; default: the whole text")
    tasks = kinds.add_parser("tasks", help="scores on tasks, through lm-eval")
    tasks.set_defaults(run=show_tasks)
    tasks.add_argument("model", metavar="M", help="folder, Hub repository, demo or demo-bf16")
    tasks.add_argument(
        "--tasks", metavar="T,T", default="local", help="lm-eval's names; local (default): those that need no download"
    )
    tasks.add_argument("--include-path", metavar="DIR", help="a folder of tasks of your own (YAML)")
    tasks.add_argument("--limit", type=int, metavar="N", help="questions of each task; default: all")
    tasks.add_argument("--num-fewshot", type=int, metavar="N")
    gate = kinds.add_parser("gate", help="compare with a baseline file; the exit status is for CI")
    gate.set_defaults(run=pass_gate)
    gate.add_argument("model", metavar="M", help="folder, Hub repository, demo or demo-bf16")
    gate.add_argument("--baseline", required=True, metavar="FILE", help="JSON; remembers reference, text and settings")
    _text_options(gate, needed=False)
    gate.add_argument("--tolerance", type=float, metavar="R", help="relative, either way; default: 0.02")
    gate.add_argument("--update", action="store_true", help="write the baseline from this run")
    for kind in (tasks, gate):
        kind.add_argument("--reference", metavar="R", help="the unquantized model to compare with")
    for kind in (diff, tasks, gate):
        kind.add_argument("--reference-dtype", metavar="D", help="default: as --dtype")
        kind.add_argument(
            "--reference-revision", metavar="R", help="default: as --revision if both are of one repository, else main"
        )
    for kind in (diff, ppl, tasks, gate):
        kind.add_argument("--json", action="store_true", help="on standard output, instead of a table")
        loading_options(kind)
        kind.add_argument(
            "--tokenizer-path", "--tokenizer", dest="tokenizer", metavar="T", help="default: each model's"
        )
        kind.add_argument(
            "--kv-cache-dtype", default="auto", metavar="D", help="of the model under test, through the engine's pages"
        )


def _text_options(parser: argparse.ArgumentParser, needed: bool) -> None:
    defaults = {"tokens": 20_000, "window": 512} if needed else {"tokens": None, "window": None}
    parser.add_argument(
        "--text", required=needed, metavar="T", help="file or folder, UTF-8; demo: the bundled held-out text"
    )
    parser.add_argument("--tokens", type=int, metavar="N", default=defaults["tokens"], help="tokens to score")
    parser.add_argument("--window", type=int, metavar="N", default=defaults["window"], help="tokens of a window")


def _candidate(arguments: argparse.Namespace, model: str) -> Any:
    from runtime.config import EngineConfig

    return EngineConfig(model, tokenizer=arguments.tokenizer, **pick(arguments, LOADING + ON_PAGES))


def _reference(arguments: argparse.Namespace, model: str) -> Any:
    """The plain side: none of the options that the candidate is asked about."""
    from runtime.config import EngineConfig

    shared = pick(arguments, ("device", "trust_remote_code", "tokenizer"))
    tested = getattr(arguments, "model", None) or arguments.candidate or model
    revision = arguments.reference_revision or (arguments.revision if tested == model else None)
    return EngineConfig(model, dtype=arguments.reference_dtype or arguments.dtype, revision=revision, **shared)


def show_difference(arguments: argparse.Namespace) -> int:
    from runtime.evaluation.compare import compare
    from runtime.evaluation.text import require_writable

    if arguments.plot:
        require_writable("--plot", arguments.plot)
    candidate = _candidate(arguments, arguments.candidate or arguments.reference)
    reference = _reference(arguments, arguments.reference)
    if candidate == reference:
        raise InvalidRequest(
            "nothing differs between the sides: give a CANDIDATE, or what is to be tried of the same checkpoint: "
            "--kernel, --attention-backend, --kv-cache-dtype, --quantization, "
            "--lm-head-quantization, --activation-quantization, --reference-dtype."
        )
    result = compare(
        reference,
        candidate,
        arguments.text,
        tokens=arguments.tokens,
        window=arguments.window,
        layers=arguments.layers,
        progress=_watched(),
    )
    _show(arguments, result)
    if arguments.plot:
        _write(arguments.plot, result.plot())
    return 0


def show_perplexity(arguments: argparse.Namespace) -> int:
    from runtime.evaluation.perplexity import perplexity

    config = _candidate(arguments, arguments.model)
    result = perplexity(
        config, arguments.text, recipe=arguments.recipe, tokens=arguments.tokens, progress=_watched()
    )  # fmt: skip
    return _show(arguments, result)


def show_tasks(arguments: argparse.Namespace) -> int:
    from runtime.evaluation.tasks import evaluate_tasks

    result = evaluate_tasks(
        _candidate(arguments, arguments.model),
        [name.strip() for name in arguments.tasks.split(",") if name.strip()],
        reference=_reference(arguments, arguments.reference) if arguments.reference else None,
        include_path=arguments.include_path,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        progress=_watched(),
    )
    return _show(arguments, result)


def pass_gate(arguments: argparse.Namespace) -> int:
    from runtime.evaluation.gate import gate

    try:
        result = gate(
            _candidate(arguments, arguments.model),
            arguments.baseline,
            reference=_reference(arguments, arguments.reference) if arguments.reference else None,
            text=arguments.text,
            tokens=arguments.tokens,
            window=arguments.window,
            tolerance=arguments.tolerance,
            update=arguments.update,
            progress=_watched(),
        )
    except Error as error:
        print(f"relinear: {error}", file=sys.stderr)
        return 2
    _show(arguments, result)
    return 0 if result.passed else 1


def _show(arguments: argparse.Namespace, result: Any) -> int:
    print(json.dumps(result.data(), indent=2, allow_nan=False) if arguments.json else result)
    return 0


def _write(file: str, content: str) -> None:
    try:
        Path(file).write_text(content, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{file}: {error}") from error


def _watched() -> bool:
    return sys.stderr.isatty()
