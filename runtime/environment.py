"""``relinear env``: what to paste into an issue."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil

PACKAGES = (
    "relinear", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface-hub", "numpy", "triton",
    "fastapi", "uvicorn", "llguidance",
)  # fmt: skip


def show(arguments: argparse.Namespace) -> int:
    """Print versions, processor, memory, devices and plugins."""
    print("\n".join(f"{label:<16} {text}" for label, text in facts()))
    return 0


def facts() -> list[tuple[str, str]]:
    """Versions, processor, memory, devices and plugins, by label."""
    import torch

    from runtime.memory import available_bytes, format_bytes

    memory = psutil.virtual_memory()
    lines = [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("cpu", f"{_processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        ("cpu level", torch.backends.cpu.get_cpu_capability()),
        (
            "memory",
            f"{format_bytes(available_bytes(torch.device('cpu')))} available of {format_bytes(memory.total)}",
        ),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        lines.append((f"cuda:{index}", f"{properties.name}, {capability}, {format_bytes(properties.total_memory)}"))
    if not torch.cuda.is_available():
        lines.append(("cuda", "none"))
    lines += [(name, _version(name)) for name in PACKAGES]
    return lines + [("plugin", text) for text in _plugins()]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _plugins() -> list[str]:
    """Formats and kernels of other packages, or what is wrong with them."""
    from quant import plugins
    from quant.base import LinearKernel, QuantMethod

    groups: list[tuple[str, type]] = [(plugins.METHODS, QuantMethod), (plugins.KERNELS, LinearKernel)]
    found = [plugin for group, wanted in groups for plugin in plugins.installed(group, wanted).values()]
    return [plugin.found if isinstance(plugin.found, str) else f"{plugin}: {plugin.point.value}" for plugin in found]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
