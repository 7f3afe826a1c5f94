"""The start-up check: broken models do not start, odd but honest ones do."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime import LLM, LoadError
from runtime.checkpoint import locate
from runtime.guard import judge


def broken_demo(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> str:
    shutil.copytree(locate("demo-bf16"), folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_nan_weights_do_not_start(tmp_path: Path) -> None:
    folder = broken_demo(tmp_path / "m", lambda t: t["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(LoadError, match=r"first forward pass failed.*NaN.*--kernel reference"):
        LLM(folder)
    assert LLM(folder, startup_check=False)


def test_a_silent_model_does_not_start(tmp_path: Path) -> None:
    folder = broken_demo(tmp_path / "m", lambda t: t["model.norm.weight"].zero_())
    with pytest.raises(LoadError, match="every token is equally likely"):
        LLM(folder)


def test_a_model_that_always_says_the_same_does_not_start() -> None:
    with pytest.raises(LoadError, match="answers token 0 with certainty"):
        judge([((0, -1e-9), (7, -40.0))] * 8, "model")


def test_repeating_oneself_is_not_forbidden() -> None:
    judge([((5, math.log(0.3)), (7, math.log(0.2)))] * 8, "model")


def test_certainty_about_different_tokens_is_not_forbidden() -> None:
    judge([((token, 0.0), (99, -50.0)) for token in range(8)], "model")
