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
    """``loop`` counts the instructions of the longest loop; the others those of the whole kernel."""

    name: str
    registers: int
    spills: int
    shared: int
    mma: int
    wgmma: int
    async_copies: int
    loop: int


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
        source = ASTSource(self.kernel, signature, constants, attributes)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return _read(self.kernel.__name__, built)


def _type_of(value: Any) -> str:
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
        loop=max(_loops(code), default=0),
    )


def _loops(code: str) -> Iterator[int]:
    """Lengths of the loops that contain no other: instructions between a label and the last branch back to it."""
    labels: dict[str, int] = {}
    place = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = place
        elif re.match(r"\s+/\*[0-9a-f]+\*/", line):
            place += 1
            branch = re.search(r"BRA\S* .*`\((\.L_\w+)\)", line)
            if branch and branch[1] in labels and place - labels[branch[1]] > 1:
                yield place - labels[branch[1]]


class Device(NamedTuple):
    """What ``device_of`` of the packages returns."""

    processors: int
    capability: tuple[int, int]


@contextmanager
def recorded(
    modules: Sequence[ModuleType], capability: tuple[int, int], processors: int = 132
) -> Iterator[list[Launch]]:
    """Launches of ``modules`` are written down instead, as for a device that is not there. Tensors may be on the meta
    device."""
    launches: list[Launch] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        options = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
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
