"""The Triton backend without a GPU: its kernels interpreted, compiled for two architectures, and refused where they must be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from attention import AttentionBatch, AttentionSpec, KVCache
from attention.kernels import tuned
from attention.paged import PagedBackend
from tests.attention.compiling import Build, builds

ROOT = Path(__file__).parents[2]
KIB = 1024
SHARED = {(8, 0): 99 * KIB, (9, 0): 227 * KIB}
"""What a program may have. Of 8.x the least, so that what is built for 8.0 also runs on the consumer cards."""

SM80, SM90 = (8, 0), (9, 0)


def test_every_kernel_in_the_interpreter() -> None:
    """In a process of its own: Triton decides between interpreter and compiler when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/attention/paged_suite.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Compiled -------------------------------------------------------------------------------------------------------------


def spec_of(dim: int, value_dim: int | None = None, heads: int = 32, kv_heads: int = 8) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, value_dim or dim, scale=dim**-0.5)


def launch(
    spec: AttentionSpec, model: torch.dtype, stored: torch.dtype, tokens: int = 512, sequences: int = 2
) -> Callable[[], object]:
    """A forward of ``tokens`` tokens: mixed, so that every kernel is launched."""

    def meta(*shape: int, dtype: torch.dtype = model) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    integers = torch.int32
    batch = AttentionBatch(
        slots=meta(tokens, dtype=torch.int64),
        block_tables=meta(sequences, 2048, dtype=integers),
        query_starts=meta(sequences + 1, dtype=integers),
        kv_lens=meta(sequences, dtype=integers),
        max_query=tokens,
        max_kv=32768,
    )
    q = meta(tokens, spec.heads, spec.key_dim)
    k, v = meta(tokens, spec.kv_heads, spec.key_dim), meta(tokens, spec.kv_heads, spec.value_dim)
    sinks = meta(spec.heads) if spec.sinks else None
    return lambda: PagedBackend().forward(0, spec, q, k, v, batch, KVCache([spec], 64, 16, stored, "meta"), sinks)


def build(capability: tuple[int, int], *arguments: object) -> dict[str, Build]:
    found = {each.name: each for each in builds(launch(*arguments), capability)}  # type: ignore[arg-type]
    assert found.keys() == {"store_kv_kernel", "decode_kernel", "reduce_kernel", "varlen_kernel"}
    for each in found.values():
        assert each.spills == 0, each
        assert each.shared <= SHARED[capability], each
    return found


BF16, FP8, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("stored", [BF16, FP8, INT8])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (576, 512)])
@pytest.mark.parametrize("capability", [SM80, SM90])
def test_every_configuration_fits_and_uses_the_tensor_cores(
    capability: tuple[int, int], dims: tuple[int, int], stored: torch.dtype
) -> None:
    found = build(capability, spec_of(*dims), BF16, stored)
    assert found["decode_kernel"].mma > 0
    assert found["decode_kernel"].async_copies > 0
    varlen = found["varlen_kernel"]
    assert varlen.mma + varlen.wgmma > 0
    if capability == SM90 and tuned.VARLEN_HOPPER[128].rows >= 64 and dims[0] <= 256:
        assert varlen.wgmma > 0


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_float32_fits(dim: int) -> None:
    build(SM80, spec_of(dim), torch.float32, torch.float32)
