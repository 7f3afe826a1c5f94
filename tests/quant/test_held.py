"""What a kernel will hold is known before there is a weight: codes that it widens and what it fills up are counted in."""

from __future__ import annotations

import pytest
import torch

from quant.base import LinearKernel, LinearShape, QuantWeight, Scheme, WeightKind, blank
from quant.kernels import held_bytes
from quant.kernels.cpu import CpuKernel
from quant.kernels.reference import ReferenceKernel
from quant.kernels.wna16 import Wna16Kernel
from tests.quant.test_kernels import CASES, Case


@pytest.mark.parametrize("kernel", [CpuKernel(), Wna16Kernel(), ReferenceKernel()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes_are_those_of_the_prepared_weight(case: Case, kernel: LinearKernel) -> None:
    weight = case.weight()
    assert held_bytes(kernel, weight.scheme, weight.shape, case.scale) == kernel.prepare(weight).nbytes


def test_widened_codes_are_counted() -> None:
    shape = LinearShape(4096, 4096)
    for bits, cpu, gpu in ((2, 4, 4), (3, 4, 4), (4, 4, 4), (5, 8, 8), (6, 8, 8), (7, 8, 8), (8, 8, 8)):
        scheme = Scheme(WeightKind.integer(bits), (1, 128))
        assert blank(scheme, shape, torch.float16).nbytes == 4096 * 4096 * bits // 8 + 4096 * 32 * 2
        for kernel, held in ((CpuKernel(), cpu), (Wna16Kernel(), gpu)):
            assert held_bytes(kernel, scheme, shape, torch.float16) / (4096 * 4096 / 8) == pytest.approx(
                held + 1 / 8, rel=0.01
            )


def test_a_kernel_that_needs_values_is_taken_to_keep_the_size() -> None:
    class Asking(ReferenceKernel):
        def prepare(self, weight: QuantWeight) -> QuantWeight:
            assert weight.scale.min().item() >= 0
            return weight

    scheme, shape = Scheme(WeightKind.INT4, (1, 32)), LinearShape(64, 32)
    assert held_bytes(Asking(), scheme, shape, torch.float16) == 32 * 32 + 32 * 2 * 2
