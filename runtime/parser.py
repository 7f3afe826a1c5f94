"""A parser that says which flag may have been meant, and the file that flags may come from."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from runtime.errors import InvalidRequest


class Parser(argparse.ArgumentParser):
    """Knows no abbreviations and suggests the nearest flag for an unknown one."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._asked = list(sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            command = self
            for word in self._asked:
                command = command.commands().get(word, command)
            message += f".{command.suggestion(unknown[1])}"
        super().error(message)

    def suggestion(self, unknown: str) -> str:
        """The flag that may have been meant, as a question; only flags that are served."""
        flags = [flag for a in self._actions if a.help != argparse.SUPPRESS for flag in a.option_strings]
        close = difflib.get_close_matches(unknown, flags, n=1)
        return f" Did you mean {close[0]}?" if close else ""

    def commands(self) -> dict[str, Parser]:
        """The parsers of its commands, by their names."""
        groups = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return {name: parser for group in groups for name, parser in group.items()}


def with_config_file(argv: Sequence[str], parser: Parser) -> list[str]:
    """``argv`` with the flags of its ``--config`` file before its own. Raises :class:`InvalidRequest`."""
    argv = list(argv)
    place = next((place for place, word in enumerate(argv) if word.partition("=")[0] == "--config"), None)
    if place is None or argv[0] != "serve":
        return argv
    _, equals, file = argv[place].partition("=")
    if not equals:
        file = argv[place + 1] if place + 1 < len(argv) else ""
    serve = parser.commands()["serve"]
    known = {flag for action in serve._actions for flag in action.option_strings}
    switches = {flag for action in serve._actions if action.nargs == 0 for flag in action.option_strings}
    words: list[str] = []
    for key, value in _read_yaml(file).items():
        flag = f"--{str(key).replace('_', '-')}"
        if flag not in known or flag in ("--config", "--help"):
            hint = serve.suggestion(flag).replace("--", "")
            raise InvalidRequest(f"--config {file}: {key!r} is not a flag of serve.{hint}")
        if (flag in switches) != isinstance(value, bool):
            kind = "true or false" if flag in switches else "a value"
            raise InvalidRequest(f"--config {file}: {key} takes {kind}, not {value!r}.")
        if flag in switches:
            words += [flag] if value else []
        else:
            words += [f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"]
    return [argv[0], *words, *argv[1:]]


def _read_yaml(file: str) -> dict[Any, Any]:
    try:
        import yaml

        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except ImportError as error:
        raise InvalidRequest(f"--config needs PyYAML ({error}): pip install 'relinear[serve]'.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidRequest(f"--config {file}: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"--config {file}: it must map flags to values, not be {type(content).__name__}.")
    return content
