"""Every test: a fixed seed, and uninitialised memory filled with NaN, so that a result nobody wrote cannot pass by luck.

``report`` collects measured numbers, which are printed when the run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

_MEASURED = "measured"


@pytest.fixture(autouse=True)
def seeded_and_poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to what is printed at the end. It travels with the test's result, from another process too."""
    return lambda line: request.node.user_properties.append((_MEASURED, line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    results = [result for results in terminalreporter.stats.values() for result in results]
    lines = [
        line
        for result in results
        if getattr(result, "when", None) == "teardown"
        for name, line in result.user_properties
        if name == _MEASURED
    ]
    if lines:
        terminalreporter.section(_MEASURED)
        for line in lines:
            terminalreporter.line(line)
