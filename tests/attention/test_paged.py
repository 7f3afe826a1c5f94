"""The Triton backend without a GPU: its kernels interpreted, compiled for two architectures, and refused where they must be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from attention import AttentionBatch, AttentionSpec, KVCache, UnsupportedAttention, select
from attention.kernels import decode, shape, store_kv, varlen
from attention.kernels.decode import splits_of
from attention.kernels.shape import split_key_dim
from attention.kernels.tuned import Config, varlen_config
from attention.paged import PagedBackend
from tests.compiling import Build, builds

ROOT = Path(__file__).parents[2]
KIB = 1024
SHARED = {(8, 0): 99 * KIB, (9, 0): 227 * KIB}
"""What a program may have. Of 8.x the least, so that what is built for 8.0 also runs on the consumer cards."""

SM80, SM90 = (8, 0), (9, 0)
KERNELS = (decode, shape, store_kv, varlen)


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
    found = {each.name: each for each in builds(launch(*arguments), KERNELS, capability)}  # type: ignore[arg-type]
    assert found.keys() == {"store_kv_kernel", "decode_kernel", "reduce_kernel", "varlen_kernel"}
    for each in found.values():
        assert each.spills == 0, each
        assert each.shared <= SHARED[capability], each
    return found


BF16, FP8, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8


WARNS = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def check_build(capability: tuple[int, int], dims: tuple[int, int], stored: torch.dtype) -> None:
    found = build(capability, spec_of(*dims, kv_heads=1 if dims[0] > 256 else 8), BF16, stored)
    assert found["decode_kernel"].mma > 0
    assert found["decode_kernel"].async_copies > 0
    varlen = found["varlen_kernel"]
    meant = capability == SM90 and varlen_config(spec_of(*dims), BF16, stored, capability).rows >= 64
    assert (varlen.wgmma if meant else varlen.mma) > 0


@WARNS
@pytest.mark.parametrize("capability", [SM80, SM90])
@pytest.mark.parametrize("stored", [BF16, FP8, INT8])
def test_kernels_of_128_fit_and_use_the_tensor_cores(capability: tuple[int, int], stored: torch.dtype) -> None:
    check_build(capability, (128, 128), stored)


@WARNS
@pytest.mark.slow
@pytest.mark.parametrize("stored", [BF16, FP8, INT8])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (256, 256), (576, 512)])
@pytest.mark.parametrize("capability", [SM80, SM90])
def test_every_other_configuration_does(
    capability: tuple[int, int], dims: tuple[int, int], stored: torch.dtype
) -> None:
    check_build(capability, dims, stored)


@WARNS
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_float32_fits(dim: int) -> None:
    build(SM80, spec_of(dim), torch.float32, torch.float32)


CEILINGS = {BF16: (387, 540), FP8: (1198, 718), INT8: (1643, 892)}
"""Instructions of the longest loop of decode and varlen for heads of 128 on sm_90, a tenth above what Triton 3.9 makes."""


@WARNS
@pytest.mark.skipif(not triton.__version__.startswith("3.9."), reason="the counts are of another compiler")
@pytest.mark.parametrize("stored", CEILINGS)
def test_loops_do_not_grow(stored: torch.dtype) -> None:
    found = build(SM90, spec_of(128), BF16, stored)
    decode, varlen = CEILINGS[stored]
    assert found["decode_kernel"].loop <= decode
    assert found["varlen_kernel"].loop <= varlen


# On the host ----------------------------------------------------------------------------------------------------------


def test_the_grid_of_a_launch_knows_no_length() -> None:
    """As many splits as fill the device, whatever the sequences hold; none where the sequences fill it."""
    config = Config(16, 64, 4, 2, programs=2)
    assert splits_of(8, config, 132, 128, 32768) == 33
    assert splits_of(256, config, 132, 128, 32768) == 1
    assert splits_of(8, config, 132, 128, 512) == 4, "two tiles each"
    assert splits_of(1, config, 132, 512, 32768) == 16, "what the reduction can hold"


def test_key_dimensions_are_held_with_little_to_spare() -> None:
    wanted = {8: (16, 0), 64: (64, 0), 80: (64, 16), 96: (64, 32), 192: (128, 64), 576: (512, 64)}
    assert {dim: split_key_dim(dim) for dim in wanted} == wanted


def test_refusals_say_why() -> None:
    backend, cpu = PagedBackend(), torch.device("cpu")
    assert backend.refuses(spec_of(64), cpu) == "its kernels need a CUDA device, not cpu"
    with pytest.raises(UnsupportedAttention, match="paged: its kernels need a CUDA device"):
        select([spec_of(64)], cpu, "paged")


def test_what_no_kernel_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend, cpu = PagedBackend(), torch.device("cpu")
    assert backend.refuses(spec_of(576, 512), cpu) is None
    assert backend.refuses(spec_of(640), cpu) == "its head dimensions end at 576"
    assert backend.refuses(replace(spec_of(64), scale=-1.0), cpu) == "its scale must be positive"
    monkeypatch.setattr("attention.paged.find_spec", lambda name: None)
    assert "pip install 'relinear[gpu]'" in (backend.refuses(spec_of(64), cpu) or "")
