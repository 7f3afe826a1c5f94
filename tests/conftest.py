"""Every test: a fixed seed, and uninitialised memory filled with NaN, so that a result nobody wrote cannot pass by luck.

``report`` collects measured numbers, which are printed when the run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

_measured = pytest.StashKey[list[str]]()


@pytest.fixture(autouse=True)
def seeded_and_poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to what is printed at the end."""
    return request.config.stash.setdefault(_measured, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(_measured, [])
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.line(line)
