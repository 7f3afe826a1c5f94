"""Orders that hold for every model, with room to spare: more bits lose less, smaller groups lose less, and on a model
with outlier channels calibration wins. What the loss is on the bundled model is in ``test_matrix.py``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch

from quant.base import WeightKind
from runtime import Comparison, EngineConfig
from runtime.evaluation.compare import compare_scorers
from runtime.evaluation.scorer import Scorer
from tests.accuracy import matrix
from tests.accuracy.calibrated import inputs_of, scale_for_awq
from tests.accuracy.matrix import Rounded, Row
from tests.accuracy.outliers import inject_outliers

MARGIN = 1.1
"""The worse must lose this much more."""
TOKENS = 1020

METHODS: dict[str, Row] = {
    f"int{bits}-g{group}": Row(f"int{bits}-g{group}", "", kind=WeightKind.integer(bits), group=group, zero_point=True)
    for bits, group in ((8, 128), (6, 128), (4, 128), (3, 128), (4, 32), (4, 64), (4, -1))
} | {
    "gptq": Row("gptq", "", kind=WeightKind.INT4, group=128, zero_point=True, calibrated=True),
    "awq": Row("awq", "", kind=WeightKind.INT4, group=128, zero_point=True),
}


def compare(candidate: Scorer) -> Comparison:
    return compare_scorers(
        matrix.reference(), candidate, matrix.DOCUMENTS, tokens=TOKENS, window=matrix.WINDOW, layers=False
    )


@cache
def loss(model: str, method: str) -> float:
    """Mean KL to the original of ``plain`` or ``hard`` weights, quantized."""
    row = METHODS[method]

    def prepare(network: torch.nn.Module) -> None:
        if model == "hard":
            inject_outliers(network)
        if method == "awq":
            scale_for_awq(network, inputs_of(network, matrix.calibration()[:2]), row.scheme)

    return compare(Rounded(row, prepare=prepare)).mean_kl.value


@pytest.mark.parametrize("model", ["plain", "hard"])
@pytest.mark.parametrize(
    "better_first",
    [
        ["int8-g128", "int6-g128", "int4-g128", "int3-g128"],
        ["int4-g32", "int4-g64", "int4-g128", "int4-g-1"],
    ],
    ids=["bits", "groups"],
)
def test_more_bits_and_smaller_groups_lose_less(model: str, better_first: list[str]) -> None:
    losses = {name: loss(model, name) for name in better_first}
    assert all(MARGIN * losses[a] < losses[b] for a, b in pairwise(better_first)), losses


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibration_wins_where_there_are_outliers(method: str, report: Callable[[str], None]) -> None:
    rounded, calibrated = loss("hard", "int4-g128"), loss("hard", method)
    report(
        f"orders    {method}: outliers raise rounding's KL {loss('plain', 'int4-g128'):.4f} -> {rounded:.4f}; "
        f"{method} {loss('plain', method):.4f} -> {calibrated:.4f}"
    )
    assert 1.25 * calibrated < rounded
    if method == "awq":  # scales undo what scales did; GPTQ has to live with the grid
        assert calibrated < 1.1 * loss("plain", "int4-g128")


@pytest.mark.parametrize("name", ["awq-int4-g128", "gptq-int4-g128"])
def test_checkpoints_of_real_libraries_lose_less_than_rounding(name: str) -> None:
    row = matrix.ROWS[name]
    found = compare(matrix.candidate(row))
    assert found.bits_per_weight < 4.2
    assert MARGIN * found.mean_kl.value < loss("plain", "int4-g128")


def test_outliers_do_not_change_the_function_but_its_rounding() -> None:
    hard = Scorer(EngineConfig("demo-bf16", dtype="float32"))
    inject_outliers(hard.model)
    found = compare(hard)
    assert found.mean_kl.value < 1e-9
    assert found.top1_agreement.value > 0.999
    assert loss("hard", "int4-g128") > 1.5 * loss("plain", "int4-g128")


def test_sixteen_bits_lose_less_than_what_is_quantized() -> None:
    """With the exceptions that the README names: bfloat16 rounds everything in float32's place, they but a part, finely."""
    losses = {name: base["metrics"]["mean_kl"]["value"] for name, base in matrix.committed().items()}
    sixteen = losses.pop("bf16")
    assert {name for name, kl in losses.items() if kl < MARGIN * sixteen} == {"int8-g128", "head-int8", "kv-int8"}
    assert compare(Scorer(EngineConfig("demo-bf16", dtype="bfloat16"))).mean_kl.value < loss("plain", "int6-g128") / 2
