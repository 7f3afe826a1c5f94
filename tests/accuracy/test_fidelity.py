"""The engine computes what Transformers does with dequantized weights, whatever the format, the kernel and the path.

Here every path with the preferred kernels, and some with the reference's; ``make accuracy`` prints the whole table."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.accuracy import fidelity


@pytest.fixture(scope="module")
def heading() -> list[str]:
    return [fidelity.header()]


@pytest.mark.parametrize("model", fidelity.MODELS)
def test_every_path_and_kernel(model: str, report: Callable[[str], None], heading: list[str]) -> None:
    if heading:
        report(f"fidelity  {heading.pop()}")
    truth = fidelity.reference(model)
    for kernel in fidelity.kernels_of(model):
        paths = fidelity.PATHS if kernel is None else ("chunked", "decode")
        row = fidelity.measure(model, kernel, truth, paths)
        report(f"fidelity  {fidelity.line(row)}")
        assert not row.failures, fidelity.line(row)


def test_what_is_too_much_or_too_little_is_named() -> None:
    fine = dict.fromkeys(fidelity.PATHS, 1e-12) | {fidelity.CACHE: 1e-4}
    assert not fidelity.Row("model", "cpu", fine, same=True).failures
    assert fidelity.Row("model", "cpu", fine, same=False).failures == ["likeliest tokens"]
    assert fidelity.Row("model", "cpu", fine | {"decode": 1e-9}, same=True).failures == ["decode"]
    for unquantized_or_broken in (1e-12, 1e-3):
        row = fidelity.Row("model", "cpu", fine | {fidelity.CACHE: unquantized_or_broken}, same=True)
        assert row.failures == [fidelity.CACHE]
        assert fidelity.line(row).endswith("FAILED: int8 KV")
