"""Builds what a launch would launch, for a GPU that is not there, and reads the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Build:
    """``loop`` counts the instructions of the loop that multiplies, or else the longest; others those of the whole kernel."""

    name: str
    registers: int
    spills: int
    shared: int
    mma: int
    wgmma: int
    async_copies: int
    loop: int
    overwritten: int
    """Instructions that write to a register of a left operand while Hopper's tensor cores may still read it: neither the
    compiler nor the assembler sees to that."""


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it was launched with."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def build(self, capability: int) -> Build:
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            special = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or (special and value == 1):
                signature[name], constants[index,] = "constexpr", value
                continue
            signature[name] = _type_of(value)
            if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
                attributes[index,] = [["tt.divisibility", 16]]
        source_of = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = source_of(self.kernel, signature, constants, attributes)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return _read(self.kernel.__name__, built)


def _type_of(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape},{value.layout!r}>"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _read(name: str, built: Any) -> Build:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()

        def tool(name: str, *options: str) -> str:
            command = [str(TOOLS / name), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = tool("cuobjdump", "--dump-resource-usage"), tool("nvdisasm", "-c")

    def count(operation: str) -> int:
        return len(re.findall(rf"\b{operation}\b", code))

    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return Build(
        name=name,
        registers=int(registers[1]),
        spills=count("LDL") + count("STL"),
        shared=built.metadata.shared,
        mma=count("HMMA"),
        wgmma=count("HGMMA"),
        async_copies=count("LDGSTS"),
        loop=len(max(_loops(code), key=_weight, default=[])),
        overwritten=_overwritten(code),
    )


def _instructions(code: str) -> Iterator[str]:
    return (line for line in code.splitlines() if re.match(r"\s+/\*[0-9a-f]+\*/", line))


def _loops(code: str) -> Iterator[list[str]]:
    """Instructions between a label and the last branch back to it."""
    labels: dict[str, int] = {}
    seen: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(seen)
        elif re.match(r"\s+/\*[0-9a-f]+\*/", line):
            seen.append(line)
            branch = re.search(r"BRA\S* .*`\((\.L_\w+)\)", line)
            if branch and branch[1] in labels and len(seen) - labels[branch[1]] > 1:
                yield seen[labels[branch[1]] :]


def _weight(loop: list[str]) -> tuple[int, int]:
    """The shortest of those with the most products; of those without, the longest."""
    products = sum("HMMA" in line or "HGMMA" in line for line in loop)
    return products, -len(loop) if products else len(loop)


def _overwritten(code: str) -> int:
    """Of the whole code in its order, and of each loop twice in a row."""
    runs = [list(_instructions(code)), *(2 * loop for loop in _loops(code))]
    return sum(_overwritten_in(run) for run in runs)


def _overwritten_in(instructions: Sequence[str]) -> int:
    found, opened, committed = 0, set[int](), list[set[int]]()
    for line in instructions:
        text = re.sub(r"/\*.*?\*/", "", line)
        if product := re.search(r"HGMMA\S+ R\d+, R(\d+), gdesc", text):
            opened |= set(range(int(product[1]), int(product[1]) + 4))
            if "gsb0" in text:
                committed.append(opened)
                opened = set()
        elif waited := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", text):
            committed = committed[len(committed) - min(len(committed), int(waited[1])) :]
        elif written := re.match(r"\s*(?:@!?U?P\d+ )?\s*([A-Z]\S*) (?:P\d, )?R(\d+)[,.]", text):
            width = 4 if "LDSM" in written[1] or ".128" in written[1] else 2 if re.search(r"64|WIDE", written[1]) else 1
            target = set(range(int(written[2]), int(written[2]) + width))
            found += bool(target & opened.union(*committed))
    return found


class Device(NamedTuple):
    """What ``device_of`` of the packages returns."""

    processors: int
    capability: tuple[int, int]

    @property
    def early(self) -> bool:
        return self.capability >= (9, 0)


@contextmanager
def recorded(
    modules: Sequence[ModuleType], capability: tuple[int, int], processors: int = 132
) -> Iterator[list[Launch]]:
    """Launches of ``modules`` are written down instead, as for a device that is not there. Tensors may be on the meta
    device."""
    launches: list[Launch] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        options = {name: given.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in given}
        launches.append(Launch(kernel, given, options))

    def device_of(index: int | None) -> Device:
        return Device(processors, capability)

    with patch.object(JITFunction, "run", run):
        patches = [patch.object(module, "device_of", device_of) for module in modules if hasattr(module, "device_of")]
        for each in patches:
            each.start()
        try:
            yield launches
        finally:
            for each in patches:
                each.stop()


def builds(launch: Callable[[], object], modules: Sequence[ModuleType], capability: tuple[int, int]) -> list[Build]:
    """Every kernel of ``modules`` that ``launch`` launches, built for ``capability``."""
    with recorded(modules, capability) as launches:
        launch()
    return [each.build(10 * capability[0] + capability[1]) for each in launches]
