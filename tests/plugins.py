"""The package of ``plugin_package``, installed for some tests: its metadata as an installer writes it, from its pyproject."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quant import kernels, plugins

PACKAGE = Path(__file__).parent / "plugin_package"


def write_metadata(site: Path) -> None:
    """``*.dist-info`` of the package in ``site``."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    header = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(header)
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))


@contextmanager
def installed_package(site: Path) -> Iterator[None]:
    """The package can be imported, and is found by its entry points, while this lasts."""
    write_metadata(site)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PACKAGE)
        patch.syspath_prepend(site)
        _forget()
        yield
    _forget()
    for name in [name for name in sys.modules if name.partition(".")[0] == "relinear_toy"]:
        del sys.modules[name]


def _forget() -> None:
    plugins.installed.cache_clear()
    kernels.create.cache_clear()


def write_toy(model: nn.Module, folder: Path) -> None:
    """Save a model in the package's format; the model itself is changed to the dequantized weights."""
    model.save_pretrained(folder)
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            step = module.weight.data.abs().amax(-1) / 7
            levels = (module.weight.data / step[:, None]).round() + 8
            module.weight.data = (levels - 8) * step[:, None]
            del state[f"{name}.weight"]
            state |= {f"{name}.levels": levels.to(torch.uint8), f"{name}.step": step}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "toy"}}))
