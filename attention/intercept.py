"""Methods of unmodified modules, answered by somebody else: the seam for what does not go through the attention function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from attention.call import Original

Answer = Callable[[nn.Module, Original, tuple[Any, ...], dict[str, Any]], Any]
"""``answer(module, original, args, kwargs)`` answers a call of ``module.method(*args, **kwargs)``."""


def intercept(modules: Iterable[nn.Module], method: str, answer: Answer) -> None:
    """Let ``answer`` answer every call of ``method`` of the modules, in place of whoever did before."""
    for module in modules:
        now = getattr(module, method)
        original = now.args[-1] if isinstance(now, partial) and now.func is _answered else now
        module.__dict__[method] = partial(_answered, answer, module, original)


def _answered(answer: Answer, module: nn.Module, original: Original, *args: Any, **kwargs: Any) -> Any:
    return answer(module, original, args, kwargs)


@contextmanager
def intercepted(modules: Iterable[nn.Module], method: str, answer: Answer) -> Iterator[None]:
    """:func:`intercept` for a while; modules that are intercepted already stay so afterwards."""
    before = {module: module.__dict__.get(method) for module in modules}
    try:
        intercept(before, method, answer)
        yield
    finally:
        for module, earlier in before.items():
            del module.__dict__[method]
            if earlier is not None:
                module.__dict__[method] = earlier
