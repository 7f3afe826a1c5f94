"""A format and a kernel of another package, and one that cannot be imported beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant import kernels, registry
from quant.base import Activation, LinearShape, NoKernel, Scheme, UnsupportedCheckpoint, WeightKind
from quant.linear import QuantLinear
from runtime import LLM, LoadError, SamplingParams, inspect, load_model
from runtime.cli import main
from tests.plugins import PACKAGE, installed_package, write_toy
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")
SHAPE = LinearShape(32, 16)
OVER_ROW_ENDS = Scheme(WeightKind.NF4, (1, 48), flat=True)
BROKEN = r"toy-broken \(relinear-toy 0\.1\.0\) cannot be imported .*libtoy\.so\.2"


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed_package(tmp_path_factory.mktemp("site")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the package's format, with the logits that it must give."""
    place = tmp_path_factory.mktemp("toy")
    model = tiny_model("llama")
    write_toy(model, place)
    with torch.inference_mode():
        torch.save(model(torch.arange(3, 15)[None]).logits, place / "logits.pt")
    return place


def test_a_checkpoint_in_a_format_of_another_package(folder: Path) -> None:
    model = load_model(folder)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 21
    logits = model(torch.arange(3, 15)[None]).logits
    torch.testing.assert_close(logits, torch.load(folder / "logits.pt"), rtol=1e-4, atol=1e-4)
    llm = LLM(folder, quantization="toy", kernel="toy", skip_tokenizer_init=True, max_total_tokens=64)
    assert "toy for 21 linear layers (toy, float32)" in llm.report
    best = logits[0, -1].argmax().item()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    assert llm.generate([list(range(3, 15))], params)[0].outputs[0].token_ids == [best]


def test_a_kernel_is_asked_after_the_fast_ones_and_before_the_reference() -> None:
    assert kernels.known() == [*list(kernels.KERNELS)[:-1], "toy", "toy-broken", "toy-wrong", "reference"]
    assert kernels.choose(OVER_ROW_ENDS, SHAPE, CPU).kernel.name == "toy"
    four = Scheme(WeightKind.INT4, (1, 32))
    usual = kernels.choose(four, SHAPE, CPU).kernel.name
    assert usual == "cpu" or "cpu" in kernels.choose(four, SHAPE, CPU).refusals
    assert kernels.choose(four, SHAPE, CPU, "toy").kernel.name == "toy"


def test_a_kernel_that_cannot_be_imported_raises_only_when_asked_for() -> None:
    with pytest.raises(NoKernel, match=BROKEN):
        kernels.choose(Scheme(WeightKind.INT8, (1, 32)), SHAPE, CPU, "toy-broken")
    with pytest.raises(LoadError, match=BROKEN):
        inspect("demo", kernel="toy-broken")
    quantized_inputs = replace(OVER_ROW_ENDS, activation=Activation(WeightKind.FP8))  # the other one refuses as well
    refusals = kernels.choose(quantized_inputs, SHAPE, CPU).refusals
    assert "libtoy" in refusals["toy-broken"]
    with pytest.raises(NoKernel, match=r"unknown kernel x; known: .*toy, toy-broken, toy-wrong, reference"):
        kernels.create("x")


def test_a_format_that_cannot_be_imported_raises_only_when_asked_for() -> None:
    assert registry.resolve({"quant_method": "awq", "bits": 4}, {}).name == "awq"
    assert "toy-broken" in registry.known_methods()
    with pytest.raises(UnsupportedCheckpoint, match=BROKEN):
        registry.resolve({"quant_method": "toy-broken"}, {})
    with pytest.raises(UnsupportedCheckpoint, match=BROKEN):
        registry.resolve({"quant_method": "awq"}, {}, "toy-broken")
    with pytest.raises(UnsupportedCheckpoint, match=rf"'new' is not supported; known: .*toy, toy-broken\. {BROKEN}"):
        registry.resolve({"quant_method": "new"}, {})


def test_the_environment_lists_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "toy (relinear-toy 0.1.0)" in shown
    assert shown.count("libtoy.so.2") == 2


def test_a_plugin_cannot_take_the_place_of_a_built_in_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "toy", registry.BUILT_IN["awq"])
    assert registry.method_class("toy").name == "awq"
    assert "toy (relinear-toy 0.1.0): a built-in format has that name" in registry.broken_plugins()


@pytest.mark.slow
def test_the_package_installs(tmp_path: Path) -> None:
    """Its own pyproject, through pip, in a process of its own."""
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--target", tmp_path, PACKAGE], check=True)
    code = (
        f"import sys; sys.path.insert(0, {json.dumps(str(tmp_path))}); from quant import kernels, registry; "
        "print(registry.method_class('toy').name, kernels.create('toy').name)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"toy toy\n"
