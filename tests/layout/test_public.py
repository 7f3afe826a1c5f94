"""The public names are those that ``__all__`` says, and every one of them can be imported."""

from __future__ import annotations

import runtime
from runtime import errors


def test_every_public_name_resolves_and_none_is_missing() -> None:
    assert sorted(runtime.__all__) == sorted(runtime._HOME)
    for name in runtime.__all__:
        assert getattr(runtime, name).__name__ == name


def test_every_error_is_public_and_drawn() -> None:
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert tree <= set(runtime.__all__)
    assert all(name in (errors.__doc__ or "") for name in tree)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(runtime, "LLMs")
