"""Every method's loss is what was committed, to the last digits that two machines share; and such a gate sees one weight."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping

import pytest
from torch import Tensor

from quant.base import LinearShape, QuantWeight, Scheme
from quant.methods.awq import AWQ
from tests.accuracy import matrix
from tests.accuracy.__main__ import README, readme_with_table


@pytest.mark.parametrize("name", matrix.ROWS)
def test_method_loss_is_as_committed(name: str, report: Callable[[str], None]) -> None:
    row = matrix.ROWS[name]
    scorer = matrix.candidate(row)
    found = matrix.measure(row, scorer)
    report(f"accuracy  {name:<16} {found.bits_per_weight:6.2f} bits per weight, mean KL {found.mean_kl.value:.6f}")
    result = matrix.check(row, found, matrix.weights_of(row, scorer))
    assert result.passed, str(result)


@pytest.mark.parametrize(
    ("output", "byte", "mask", "by_numbers"),
    [(0, 0, 0x08, True), (255, 100, 0x80, True), (40, 300, 0x08, True), (7, 11, 0x01, False)],
)
def test_one_weight_changed_in_one_layer_fails_the_gate(
    output: int, byte: int, mask: int, by_numbers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first down_proj that the method repacks gets one bit of one of its 196,608 nibbles flipped. The top bit shows in the
    loss; what does not, in the weights."""
    real = AWQ.repack
    flipped: list[str] = []

    def repack(self: AWQ, tensors: Mapping[str, Tensor], scheme: Scheme, shape: LinearShape) -> QuantWeight:
        weight = real(self, tensors, scheme, shape)
        if shape.in_features == 768 and not flipped:
            flipped.append(str(shape))
            weight.q[output, byte] ^= mask
        return weight

    monkeypatch.setattr(AWQ, "repack", repack)
    row = matrix.ROWS["awq-int4-g128"]
    scorer = matrix.candidate(row)
    result = matrix.check(row, matrix.measure(row, scorer), matrix.weights_of(row, scorer))
    assert flipped
    assert not result.passed
    assert result.changes == ("weights are not those that were committed",)
    assert any(finding.verdict != "ok" for finding in result.findings) or not by_numbers


def test_the_table_and_the_figures_are_those_of_the_baselines() -> None:
    """``make accuracy`` writes them."""
    text = README.read_text()
    assert readme_with_table(text) == text
    for kind, svg in matrix.figures().items():
        assert matrix.FIGURES[kind].read_text() == svg
        ElementTree.fromstring(svg)
        assert "prefers-color-scheme: dark" in svg
    assert {file.stem for file in matrix.BASELINES.glob("*.json")} == set(matrix.ROWS)
