"""Mixtures of experts whose experts are quantized: equal to the dense model with the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quant.activation import quantize_dequantize
from quant.experts import QuantExperts
from quant.linear import QuantLinear
from runtime import LLM, SamplingParams, inspect, load_model
from runtime.checkpoint import Checkpoint
from runtime.loader import load
from runtime.plan import make_plan
from runtime.verify import verify
from tests.families import FAMILIES
from tests.greedy import greedy_alone
from tests.moe_writer import MODELS, SIZES, dense_twin, moe_model, write_moe, write_mxfp4
from tests.planned import assert_bytes_as_planned
from tests.tiny_models import VOCABULARY, tiny_model

OSS = {"layer_types": ["sliding_attention", "full_attention"]}


def written(name: str, folder: Path, family: str, **options: Any) -> Path:
    write_moe(moe_model(name), folder, FAMILIES[family], **options)
    return folder


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(0))
    return model(ids).logits


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """Kernels that multiply in another order than torch differ by 8e-7 of the largest logit; dequantizing ones not at all."""
    ours, theirs = logits(found), logits(expected)
    assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format(tmp_path: Path, family: str) -> None:
    folder = written("qwen3_moe", tmp_path, family)
    loaded = load(make_plan(Checkpoint.open(folder), dtype="float32", device="cpu", weight_only=True))
    model = loaded.model
    assert_same(model, dense_twin(folder))
    assert_bytes_as_planned(loaded)
    layers = [m for name, m in model.named_modules() if ".experts." in name and isinstance(m, QuantLinear)]
    assert len(layers) == 4 * 3
    assert not any(list(layer.buffers()) for layer in layers), "packed tensors are freed"


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(tmp_path: Path, name: str) -> None:
    folder = written(name, tmp_path, "fp8-block")
    model = load_model(folder, dtype="float32", kernel="reference")
    assert_same(model, dense_twin(folder))
    assert any(isinstance(module, QuantExperts) for module in model.modules())
    routers = [m for name, m in model.named_modules() if name.endswith((".gate", ".router", ".shared_expert_gate"))]
    assert routers
    assert not any(isinstance(module, QuantLinear) for module in routers)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mxfp4")
    write_mxfp4(tiny_model("gpt_oss", **SIZES, **OSS), folder)
    return folder


def test_experts_in_one_tensor_with_biases_and_an_interleaved_gate(stacked: Path) -> None:
    assert_same(load_model(stacked, dtype="float32"), dense_twin(stacked))


def test_a_checkpoint_without_the_base_models_prefix(tmp_path: Path) -> None:
    for write in (
        lambda: write_moe(moe_model("mixtral"), tmp_path, FAMILIES["awq"]),
        lambda: write_mxfp4(tiny_model("gpt_oss", **SIZES, **OSS), tmp_path),
    ):
        write()
        tensors = load_file(tmp_path / "model.safetensors")
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert_same(load_model(tmp_path, dtype="float32"), dense_twin(tmp_path))


@contextmanager
def quantized_inputs(reference: Any, layer: QuantLinear) -> Iterator[None]:
    """Quantize what goes into every matrix of a dense model but router and head, as ``layer`` does it."""
    left = {id(reference.lm_head.weight), *(id(p) for name, p in reference.named_parameters() if "gate.weight" in name)}
    activation, weight = layer.scheme.activation, layer.quant_weight
    assert activation is not None
    assert weight is not None

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is F.linear and id(args[1]) not in left:
                args = (quantize_dequantize(args[0], activation, weight.input_scale, None), *args[1:])
            return function(*args, **(kwargs or {}))

    with Mode():
        yield


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.inputs] + ["fp8-block"])
def test_inputs_of_experts_are_quantized_where_the_format_says_so(tmp_path: Path, family: str) -> None:
    folder = written("qwen3_moe", tmp_path, family)
    model = load_model(folder, dtype="float32", weight_only=False, kernel="reference")
    reference = dense_twin(folder)
    reference.set_experts_implementation("eager")
    alone = logits(reference)
    layer = model.get_submodule("model.layers.1.mlp.experts.2.up_proj")
    assert isinstance(layer, QuantLinear)
    with quantized_inputs(reference, layer):
        expected = logits(reference)
    found = logits(model)
    assert (found - expected).abs().mean() < 1e-5
    assert (alone - expected).abs().mean() > 1e-3, "quantized inputs would not be missed"


ENGINE = {"mixtral": "fp8-block", "deepseek_v3": "awq", "qwen3_moe": "ct-w8a8"}


@pytest.mark.parametrize("name", [*ENGINE, "gpt_oss"])
def test_the_engine_says_what_the_loaded_model_says(tmp_path: Path, stacked: Path, name: str) -> None:
    folder = stacked if name == "gpt_oss" else written(name, tmp_path, ENGINE[name])
    model = load_model(folder, dtype="float32")
    prompts = [[(7 * i * i + 5 * place) % VOCABULARY for i in range(n)] for place, n in enumerate((9, 3, 14))]
    expected = [greedy_alone(model, prompt, 6) for prompt in prompts]
    llm = LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_num_batched_tokens=7, max_total_tokens=64)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected


def test_one_expert_dense_by_a_rule_that_names_it_as_the_file_does(tmp_path: Path) -> None:
    """Mixtral's files say ``block_sparse_moe``, Transformers' tree says ``mlp``."""
    expert = "model.layers.0.block_sparse_moe.experts.1."
    folder = written("mixtral", tmp_path, "gptq-act-order", wanted=lambda name: not name.startswith(expert))
    assert_same(load_model(folder, dtype="float32"), dense_twin(folder))
    modules = {module["name"]: module for module in inspect(folder).data()["modules"]}
    dense = modules["model.layers.0.mlp.experts.1.w1"]
    assert (dense["format"], dense["why"]) == ("dense", "stored dense: the file has no qweight for it")
    assert modules["model.layers.0.mlp.experts.0.w1"]["format"] == "gptq"
    edit_quantization(folder, dynamic={f"-:{expert}": {}, "-:.*experts.9": {}}, modules_to_not_convert=["gate"])
    data = inspect(folder).data()
    modules = {module["name"]: module for module in data["modules"]}
    assert "left dense by dynamic" in modules["model.layers.0.mlp.experts.1.w1"]["why"]
    assert data["unmatched"] == ["dynamic: -:.*experts.9"], "the router is no linear layer, but it is there"


def test_biases_that_a_writer_adds(tmp_path: Path) -> None:
    """auto-gptq stores one for every layer; one that is not zero counts."""
    folder = written("qwen3_moe", tmp_path, "gptq-act-order")
    for value in (0.0, 0.5):
        tensors = load_file(folder / "model.safetensors")
        biases = {n[:-7] + "bias": torch.full((t.shape[1],), value) for n, t in tensors.items() if "qweight" in n}
        save_file(tensors | biases, folder / "model.safetensors", metadata={"format": "pt"})
        distance = (logits(load_model(folder, dtype="float32")) - logits(dense_twin(folder))).abs().max()
        assert (distance > 0.1) == bool(value)


def test_layers_whose_experts_are_all_dense(tmp_path: Path) -> None:
    folder = written("mixtral", tmp_path, "awq", wanted=lambda name: "layers.0." not in name)
    assert_same(load_model(folder, dtype="float32"), dense_twin(folder))


def test_dense_experts_of_a_quantized_model_stay_transformers_own(tmp_path: Path) -> None:
    folder = written("qwen3_moe", tmp_path, "awq", wanted=lambda name: "experts" not in name)
    model = load_model(folder, dtype="float32")
    assert_same(model, dense_twin(folder))
    assert not any(isinstance(module, QuantExperts) for module in model.modules())


def test_the_report_has_a_row_a_projection_and_the_right_bytes(tmp_path: Path, stacked: Path) -> None:
    folder = written("mixtral", tmp_path, "awq")
    table = str(inspect(folder))
    assert "model.layers.{0-1}.mlp.experts.{0-3}.w{1,3} 64→96" in table
    assert "model.layers.{0-1}.mlp.experts.{0-3}.w2 96→64" in table
    assert len(table.splitlines()) < 20
    for place in (folder, stacked):
        plan = make_plan(Checkpoint.open(place), dtype="float32", device="cpu")
        model = load(plan).model
        weights = [m.quant_weight for m in model.modules() if isinstance(m, QuantLinear)]
        held = sum(weight.nbytes for weight in weights if weight)
        assert plan.weight_bytes == held + sum(tensor.nbytes for tensor in model.state_dict().values())
        assert plan.weight_bytes < plan.peak_bytes < 2 * plan.weight_bytes


def test_verify_reads_experts_and_names_a_damaged_one(tmp_path: Path, stacked: Path) -> None:
    for folder in (written("mixtral", tmp_path, "awq"), stacked):
        found = verify(folder, against_transformers=True, tokens=24)
        assert found.passed, str(found)
        assert found.comparison
        assert any(".experts.3." in name for name in found.comparison.linears)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.scales"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.experts.2.w3.scales: 1 of" in verify(tmp_path).damage[0]


def edit_quantization(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
