"""Loading: what the plan says is what happens, and everything that cannot be right is refused with a reason."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.linear import QuantLinear
from runtime import inspect, load_model
from runtime.errors import LoadError

AWQ = Path(__file__).parents[1] / "checkpoints" / "autoawq--gemm-g128"
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A private copy of a real AWQ checkpoint."""
    return Path(shutil.copytree(AWQ, tmp_path / "model"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_quantization(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_the_loaded_model_is_a_plain_transformers_model() -> None:
    model = load_model("demo", quantization="awq")
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert model(ids).logits.shape == (1, 3, model.config.vocab_size)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1).shape == (1, 7)
    quantized = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(quantized) == 7 * model.config.num_hidden_layers
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_packed_tensors_are_freed_after_the_repack() -> None:
    model = load_model(AWQ)
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, QuantLinear)
    assert not dict(layer.named_buffers())
    assert layer.quant_weight is not None
    bits = 8 * layer.quant_weight.nbytes / (layer.in_features * layer.out_features)
    assert bits < 4.5


def test_a_move_to_another_dtype_leaves_codes_and_scales_alone() -> None:
    model = load_model(AWQ, dtype="float32")
    layer = model.get_submodule(LAYER)
    before = {name: tensor.dtype for name, tensor in layer.quant_weight.tensors().items()}
    model.to(torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in layer.quant_weight.tensors().items()} == before


@pytest.mark.parametrize(
    ("dtype", "loaded"), [("auto", torch.bfloat16), ("half", torch.float16), (torch.float32, torch.float32)]
)
def test_dtypes(dtype: Any, loaded: torch.dtype) -> None:
    model = load_model(AWQ, dtype=dtype)
    assert model.lm_head.weight.dtype == loaded
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2]])).logits.dtype == loaded


# --quantization confirms, --kernel chooses, and neither does the other's work


def test_another_format_than_asked_for_names_both() -> None:
    with pytest.raises(
        LoadError, match=r"--quantization awq was asked for.*it is not quantized.*written by llm-compressor"
    ):
        load_model("demo-bf16", quantization="awq")
    with pytest.raises(LoadError, match=r"--quantization nonsense: no such format; known: .*awq"):
        load_model(AWQ, quantization="nonsense")


def test_a_spelling_of_other_runtimes_is_the_same_format() -> None:
    assert inspect(AWQ, quantization="awq_marlin").plan.method is not None


def test_naming_the_format_does_not_choose_the_kernel() -> None:
    kernels = [{module["kernel"] for module in inspect(AWQ, quantization=q).data()["modules"]} for q in (None, "awq")]
    assert kernels[0] == kernels[1]


def test_an_unknown_kernel_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(LoadError, match=r"(?s)marlin.*reference"):
        load_model(AWQ, kernel="marlin")
    with pytest.raises(LoadError, match=r"(?s)marlin.*reference"):
        load_model("demo-bf16", kernel="marlin")
    with pytest.raises(LoadError, match="this checkpoint has none"):
        load_model("demo-bf16", kernel="reference")
    with pytest.raises(LoadError, match="unknown attention backend 'nonsense'"):
        inspect(AWQ, attention_backend="nonsense")


def test_an_asked_kernel_is_taken() -> None:
    layer = load_model(AWQ, kernel="reference").get_submodule(LAYER)
    assert isinstance(layer, QuantLinear)
    assert layer.kernel.name == "reference"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp7", "quant_method 'fp7' is not supported; known: .*awq"),
        ("GGML", "quant_method 'ggml' is not supported; known: .*awq"),
        ("", "has no quant_method. Add the format .*awq"),
    ],
)
def test_an_unknown_method_names_the_known(folder: Path, name: str, message: str) -> None:
    edit_quantization(folder, quant_method=name)
    with pytest.raises(LoadError, match=message):
        load_model(folder)


def test_an_unknown_option_value_is_an_error(folder: Path) -> None:
    for options, message in (
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"dtype": torch.int8}, "no dtype to compute in"),
        ({"device": "tpu9"}, "tpu9"),
        ({"device": "meta"}, "device meta is not supported"),
    ):
        with pytest.raises(LoadError, match=message):
            load_model(folder, **options)


# Damaged files


def replace(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


def nan_scale(scales: Tensor) -> Tensor:
    scales[1, 3] = torch.nan
    return scales


DAMAGES = [
    (lambda t: t.pop(f"{LAYER}.scales"), rf"{LAYER}\.scales is missing"),
    (lambda t: t.pop(f"{LAYER}.qzeros"), rf"{LAYER}: qzeros is missing.*zero_point"),
    (lambda t: t.pop(f"{LAYER}.qweight"), rf"{LAYER}: (scales|qzeros) is there but qweight is missing"),
    (lambda t: t.pop("model.norm.weight"), r"1 parameters.*stored nowhere: model\.norm\.weight"),
    (lambda t: t.pop("model.layers.1.self_attn.q_proj.bias"), r"stored nowhere: model\.layers\.1\.self_attn\.q_proj\.bias"),
    (replace(f"{LAYER}.scales", lambda s: s[:, :-8].clone()), rf"{LAYER}\.scales is float16 \[4, 248\].*\[4, 256\]"),
    (replace(f"{LAYER}.qweight", lambda q: q.to(torch.int64)), rf"{LAYER}\.qweight is int64 .*needs int32"),
    (replace(f"{LAYER}.scales", lambda s: s.to(torch.int8)), rf"{LAYER}\.scales is int8"),
    (replace(f"{LAYER}.scales", nan_scale), rf"{LAYER}\.scales: 1 of 1024 values are NaN"),
    (replace(f"{LAYER}.scales", lambda s: s * torch.inf), rf"{LAYER}\.scales: .* values are NaN or infinite"),
    (replace("model.norm.weight", lambda w: w[:-1].clone()), r"model\.norm\.weight is float16 \[255\].*needs float16 \[256\]"),
    (lambda t: t.update({"model.layers.0.mlp.act.scales": torch.ones(512)}), r"mlp\.act\.scales .*ScaledActivation"),
    (replace("lm_head.weight", lambda w: w.to(torch.float8_e4m3fn)), r"lm_head\.weight is stored as float8_e4m3fn"),
    (lambda t: t.update({f"{LAYER}.weight": torch.zeros(256, 512)}), rf"{LAYER}: both qweight and a dense weight"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_damaged_checkpoint_is_refused(
    folder: Path, damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(folder, damage)
    with pytest.raises(LoadError, match=message):
        load_model(folder)


def test_a_group_that_does_not_divide(folder: Path) -> None:
    edit_quantization(folder, group_size=96)
    with pytest.raises(LoadError, match=r"group 96 does not divide 256 inputs \(quantization_config: group_size\)"):
        load_model(folder)


def test_a_group_size_that_the_scales_contradict(folder: Path) -> None:
    edit_quantization(folder, group_size=64)
    with pytest.raises(
        LoadError, match=r"q_proj\.scales is float16 \[2, 256\], but this layer needs float16 \[4, 256\]"
    ):
        load_model(folder)


def test_a_config_that_skips_a_quantized_layer(folder: Path) -> None:
    edit_quantization(folder, modules_to_not_convert=["mlp.down_proj"])
    with pytest.raises(
        LoadError, match=rf"{LAYER}: qweight is stored, but modules_to_not_convert lists 'mlp\.down_proj'"
    ):
        load_model(folder)


def test_a_dense_checkpoint_that_claims_to_be_quantized(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    load_model("demo-bf16").save_pretrained(tmp_path / "dense")
    dense = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(
        json.dumps(dense | {"quantization_config": config["quantization_config"]})
    )
    with pytest.raises(LoadError, match=r"no linear layer of LlamaForCausalLM is stored so"):
        load_model(tmp_path / "dense")


def test_quantized_codes_are_never_read_as_dense_weights(folder: Path) -> None:
    """The silent failure of others: FP8 codes copied into bf16 parameters when the configuration is lost."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="belong to no module"):
        load_model(folder)
    load_model("demo-bf16").save_pretrained(folder)
    edit_tensors(folder, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items() if "proj" in k}))
    with pytest.raises(LoadError, match="quantized values, but the checkpoint's configuration does not say"):
        load_model(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t, name: t.pop(name),
        lambda t, name: t.update({name: t[name][:, :-1].clone()}),
    ],
    ids=["missing", "cut"],
)
def test_a_damaged_expert_is_found_before_weights_are_read(tmp_path: Path, damage: Any) -> None:
    from tests.tiny_models import tiny_model

    tiny_model("mixtral").save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: damage(t, next(name for name in sorted(t) if "experts.2" in name)))
    with pytest.raises(LoadError, match=r"experts\.\w+ .* is made of \d+ stored tensors"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ["llama"]}, "model type"),
        ({"torch_dtype": "float16", "quantization_config": []}, "not an object"),
    ],
)
def test_configuration_of_the_wrong_kind(folder: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(LoadError, match=message):
        load_model(folder)


def test_an_adapter_is_not_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match="is an adapter"):
        load_model(folder)


def test_a_loaded_model_can_be_copied() -> None:
    model = load_model("demo", dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


# Remote code

POISON = "from pathlib import Path\nPath(__file__).with_name('EXECUTED').touch()\nraise SystemExit('poisoned')\n"


def poison(folder: Path) -> None:
    (folder / "evil.py").write_text(POISON)
    entries = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | {"auto_map": entries}))


def test_nothing_of_a_poisoned_folder_is_run(tmp_path: Path) -> None:
    from runtime import LLM
    from runtime.checkpoint import locate

    folder = Path(shutil.copytree(locate("demo"), tmp_path / "native"))
    poison(folder)
    assert inspect(folder).data()["unclaimed"] == []
    load_model(folder)
    LLM(str(folder)).generate("x")
    assert not (folder / "EXECUTED").exists(), "a known model type needs no code of the checkpoint"


def test_a_model_that_needs_its_code_is_refused_without_the_flag(folder: Path) -> None:
    poison(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(LoadError, match=r"model type 'evil' needs Python code.*config\.json.*--trust-remote-code"):
        load_model(folder)
    assert not (folder / "EXECUTED").exists()


def test_with_the_flag_the_code_is_run(folder: Path, tmp_path: Path) -> None:
    """The opposite, so that the two tests above could fail. In a process of its own: it dies by design."""
    poison(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    code = f"from runtime import load_model; load_model({str(folder)!r}, trust_remote_code=True)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path), "PATH": ""},
        check=False,
    )
    assert "poisoned" in done.stderr


def test_an_unknown_model_type_without_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama99"}))
    with pytest.raises(LoadError, match=r"model type 'llama99'.*not known to Transformers"):
        load_model(folder)


def test_a_model_that_is_no_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5Model

    T5Model(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=16)).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="cannot be built as a causal language model"):
        load_model(tmp_path)
