"""The assembly that unpacks weights, executed without a GPU: instruction by instruction, in Python."""

from __future__ import annotations

import re
from unittest.mock import patch

import pytest
import torch

from quant.kernels.gpu import unpack

ALL = 0xFFFFFFFF
TABLE = tuple(float(value) for value in torch.linspace(-1, 1, 16) ** 3)


def lop3(a: int, b: int, c: int, function: int) -> int:
    """Of every three bits, the bit of ``function`` that they number."""
    result = 0
    for bit in range(8):
        if function >> bit & 1:
            result |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    return result & ALL


def prmt(a: int, b: int, selector: int) -> int:
    """Each byte of the result is the one of eight that three bits number."""
    chosen = [selector >> 4 * byte & 15 for byte in range(4)]
    assert max(chosen) < 8, "the fourth bit would copy a sign"
    return sum(((a | b << 32) >> 8 * byte & 255) << 8 * place for place, byte in enumerate(chosen))


def halves(word: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([word], dtype=torch.uint32).view(torch.int32).view(dtype)


def fma(a: int, b: int, c: int, dtype: torch.dtype) -> int:
    value = halves(a, dtype).double() * halves(b, dtype).double() + halves(c, dtype).double()
    return int(value.to(dtype).view(torch.int32)) & ALL


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, n: a << n & ALL,
    "shr.u32": lambda a, n: a >> n,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "fma.rn.bf16x2": lambda a, b, c: fma(a, b, c, torch.bfloat16),
    "mul.rn.f16x2": lambda a, b: fma(a, b, 0, torch.float16),
}


def execute(assembly: str, words: tuple[int, int], outputs: int) -> list[int]:
    values = {f"${outputs}": words[0], f"${outputs + 1}": words[1]}
    for line in re.sub(r"[{}]|\.reg[^;]*;", "", assembly).split(";"):
        if not line.strip():
            continue
        operation, arguments = line.split(None, 1)
        target, *operands = (each.strip() for each in arguments.split(","))
        assert target not in (f"${place}" for place in range(outputs, outputs + 10)), "only outputs are its own"
        values[target] = OPERATIONS[operation](*(values[o] if o in values else int(o, 0) & ALL for o in operands))
    return [values[f"${plane}"] for plane in range(outputs)]


def numbers(kind: str, dtype: torch.dtype, code: int) -> float:
    if kind == "table":
        return float(torch.tensor(TABLE[code]).to(dtype))
    if kind == "e2m1":
        return (-1 if code & 8 else 1) * (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7]
    if kind == "fp8":
        return float(torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn))
    return code + unpack.offset_of(kind, dtype, "any")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "count"),
    [("uint4", 8), ("uint4", 4), ("uint8", 4), ("fp8", 4), ("e2m1", 8), ("e2m1", 4), ("table", 8), ("table", 4)],
)
def test_every_code_becomes_its_number_in_its_plane(kind: str, count: int, dtype: torch.dtype) -> None:
    bits = 8 if kind in ("uint8", "fp8") else 4
    planes = 32 // bits
    with patch.object(unpack, "interpreting", lambda: False):
        assembly = unpack.assembly_of.__wrapped__(kind, dtype, TABLE, count)
    codes = torch.randint(1 << bits, (64, 2, planes))
    codes.view(-1)[: 1 << bits] = torch.arange(1 << bits)
    if kind == "fp8":
        codes[codes & 127 == 127] = 0  # NaN, which no checkpoint has
    for pair in codes.tolist():
        words = tuple(sum(code << bits * plane for plane, code in enumerate(word)) for word in pair)
        for plane, found in enumerate(execute(assembly, words, count)):
            wanted = [numbers(kind, dtype, word[plane]) for word in pair]
            assert halves(found, dtype).tolist() == wanted, (plane, pair)
