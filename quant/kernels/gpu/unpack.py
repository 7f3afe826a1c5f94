"""From words of the planar layout (:mod:`quant.kernels.planar`) to the planes of numbers in them.

On NVIDIA, in assembly: Triton would take 7 to 8 instructions for a weight, and a GPU that reads 4-bit weights as fast as its
memory allows has time for 4. Two words together (``pack=2``) give the two neighbours that a tensor core wants in a register;
an integer becomes a float by being written into the mantissa of a power of two. Elsewhere, and in the interpreter, the same
in Triton.

Numbers of float kinds come as they are, unscaled. To integers :func:`offset` is added, which goes with the zero point.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from quant.scheme import WeightKind


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter, which needs no device, and knows no assembly."""
    return not isinstance(number, triton.JITFunction)


def name_of(kind: WeightKind) -> str:
    """What the kernels call a kind."""
    if kind.is_integer:
        return "uint4" if kind.bits <= 4 else "uint8"
    return "table" if kind.has_table else kind.value


def offset_of(kind: str, dtype: torch.dtype, assembly: str) -> int:
    """What has been added to an integer: 128 and 1024 have mantissas whose last bit counts 1."""
    if not assembly or kind not in ("uint4", "uint8"):
        return 0
    if dtype == torch.float16:
        return 1024
    return 128 if kind == "uint4" else -128


def _times(plane: int, bf16: bool, factor: int) -> str:
    """``t`` times a power of two that puts the exponent right; bfloat16 has no multiplication before compute capability 9.0."""
    if bf16:
        return f"mov.b32 s, {factor}; mov.b32 one, {0x80008000}; fma.rn.bf16x2 ${plane}, t, s, one;"
    return f"mov.b32 s, {factor}; mul.rn.f16x2 ${plane}, t, s;"


@cache
def assembly_of(kind: str, dtype: torch.dtype, values: tuple[float, ...] | None, count: int) -> str:
    """From two words, ``$8, $9``, to eight pairs, or from ``$4, $5`` to four: ``count``, as many as there are or the first
    four. Empty where there is no assembly. ``values`` are those of a table."""
    if interpreting() or torch.version.hip is not None:
        return ""
    if kind == "table":
        assert values is not None
        return _table_assembly(torch.tensor(values).to(dtype).view(torch.int16).tolist(), count)
    bf16 = dtype == torch.bfloat16
    if kind in ("uint4", "e2m1"):
        lines = [f"prmt.b32 low, ${count}, ${count + 1}, 0x5410;", f"prmt.b32 high, ${count}, ${count + 1}, 0x7632;"]
        for plane in range(count):
            half, place = ("low", "high")[plane // 4], 4 * (plane % 4)
            if kind == "uint4":
                lines += [
                    f"shr.u32 t, {half}, {place};",
                    f"lop3.b32 ${plane}, t, 0x000f000f, {0x43004300 if bf16 else 0x64006400}, 0xea;",
                ]
            else:
                lines += [f"shl.b32 t, {half}, {12 - place};", "and.b32 s, t, 0x80008000;"]
                move = (6 if bf16 else 9) - place
                lines += [
                    f"shl.b32 t, {half}, {move};" if move > 0 else f"shr.u32 t, {half}, {-move};",
                    f"lop3.b32 t, t, {0x01C001C0 if bf16 else 0x0E000E00}, s, 0xea;",
                    _times(plane, bf16, 0x7E807E80 if bf16 else 0x74007400),
                ]
    else:
        lines = []
        for plane in range(4):
            twice = plane * 0x11 + (4 + plane) * 0x1100
            lines += [f"prmt.b32 low, $4, $5, {twice};"]
            if kind == "uint8" and bf16:  # 2048 + 16 * high and 128 + low, since 8 bits are too many for one mantissa
                lines += [
                    f"lop3.b32 t, low, 0x000f000f, {0x43004300}, 0xea;",
                    "shr.u32 high, low, 4;",
                    f"lop3.b32 high, high, 0x000f000f, {0x45004500}, 0xea;",
                    f"mov.b32 one, {0x3F803F80};",
                    f"mov.b32 s, {0xC510C510};",  # -2304
                    "fma.rn.bf16x2 high, high, one, s;",
                    f"fma.rn.bf16x2 ${plane}, high, one, t;",
                ]
            elif kind == "uint8":
                lines += [f"lop3.b32 ${plane}, low, 0x00ff00ff, {0x64006400}, 0xea;"]
            else:
                lines += [
                    "and.b32 s, low, 0x80008000;",
                    f"shl.b32 t, low, {4 if bf16 else 7};",
                    f"lop3.b32 t, t, {0x07F007F0 if bf16 else 0x3F803F80}, s, 0xea;",
                    _times(plane, bf16, 0x7B807B80 if bf16 else 0x5C005C00),
                ]
    return "{ .reg .b32 low, high, s, t, one; " + " ".join(lines) + " }"


def _table_assembly(bits: list[int], count: int) -> str:
    """A byte permutation takes 4 of 8 bytes by 4 numbers of 3 bits: two of them, and a third that takes from both by the
    fourth bits, look up one byte of 4 codes. ``even`` has the codes of planes 0, 2, 4 and 6 of both words beside each
    other, ``odd`` those of the others."""

    def four(first: int, shift: int) -> int:
        return sum((bits[first + i] >> shift & 255) << 8 * i for i in range(4))

    one, two = f"${count}", f"${count + 1}"
    lines = [f"shl.b32 t, {two}, 4;", f"lop3.b32 even, {one}, t, {0x0F0F0F0F}, 0xe4;"]
    lines += [f"shr.u32 t, {one}, 4;", f"lop3.b32 odd, t, {two}, {0x0F0F0F0F}, 0xe4;"]
    for first, codes in enumerate(("even", "odd")):
        for half in range(count // 4):
            if half:
                lines += [f"shr.u32 {codes}, {codes}, 16;"]
            lines += [f"and.b32 s, {codes}, 0x7777;", f"shr.u32 t, {codes}, 1;", "lop3.b32 t, t, 0x4444, 0x3210, 0xea;"]
            for name, shift in (("low", 0), ("high", 8)):
                for target, start in ((name, 0), ("other", 8)):
                    lines += [f"prmt.b32 {target}, {four(start, shift)}, {four(start + 4, shift)}, s;"]
                lines += [f"prmt.b32 {name}, {name}, other, t;"]
            plane = first + 4 * half
            lines += [f"prmt.b32 ${plane}, low, high, 0x5140;", f"prmt.b32 ${plane + 2}, low, high, 0x7362;"]
    return "{ .reg .b32 low, high, other, s, t, even, odd; " + " ".join(lines) + " }"


@triton.constexpr_function
def times(count, dtype):
    return (dtype,) * count


@triton.jit
def planes(word, table, KIND: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, COUNT: tl.constexpr):
    """The first ``COUNT`` planes of ``word``, all or four, as ``DTYPE``."""
    if ASSEMBLY != "" and COUNT == 8:
        return tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [word],
            dtype=times(8, DTYPE), is_pure=True, pack=2,
        )  # fmt: skip
    elif ASSEMBLY != "":
        return tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r,r", [word],
            dtype=times(4, DTYPE), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        BITS: tl.constexpr = 8 if KIND == "uint8" or KIND == "fp8" else 4
        found = ()
        for plane in tl.static_range(COUNT):
            found += (number(word, plane * BITS, table, KIND, DTYPE),)  # type: ignore[assignment]
        return found


@triton.jit
def number(word, place: tl.constexpr, table, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers whose codes begin at bit ``place``, in plain Triton."""
    code = word >> place
    if KIND == "fp8":
        bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
        return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)
    elif KIND == "e2m1":
        bits = ((code & 8) << 28) | ((code & 7) << 22)
        return (bits.to(tl.float32, bitcast=True) * 8.507059173023462e37).to(DTYPE)
    elif KIND == "table":
        return tl.load(table + (code & 15)).to(DTYPE)
    elif KIND == "uint8":
        return (code & 255).to(tl.float32).to(DTYPE)
    else:
        return (code & 15).to(tl.float32).to(DTYPE)
