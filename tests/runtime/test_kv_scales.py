"""The scales that checkpoints bring for keys and values, through the engine: which are used, and which are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from attention.base import AttentionBatch, AttentionSpec
from attention.kv_cache import KVCache
from attention.reference import ReferenceBackend
from quant.kv_scales import KVScale, kv_cache_asked, kv_scale_of
from runtime import LLM, LoadError, SamplingParams, inspect, load_model
from runtime.config import EngineConfig
from runtime.evaluation.scorer import Scorer
from tests.formats import CHECKPOINTS
from tests.quant.test_writers import NOISE, before_export, quantized
from tests.runtime.test_fidelity import recorded
from tests.tiny_models import tiny_model

LLMC, MODELOPT = CHECKPOINTS / "llmcompressor--fp8-static-kv", CHECKPOINTS / "modelopt--fp8-kv"
SCALE = "model.layers.1.self_attn.k_scale"
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "max_total_tokens": 64, "startup_check": False}


Rounded = Callable[[Tensor, Tensor], Tensor]
"""What a key or value and its scale come to before they are rounded to FP8."""


class WritersAttention(ReferenceBackend):
    """Stores and reads as the reference does, and in between computes as writers do: ``divided`` in their arithmetic, and what
    was stored given to torch's attention in the model's dtype. Without that their FP8 inputs of the next layer are others."""

    def __init__(self, divided: Rounded) -> None:
        self.divided = divided

    def forward(
        self,
        call: int,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: AttentionBatch,
        cache: KVCache,
        sinks: Tensor | None,
    ) -> Tensor:
        for_division = []
        for new, scale in zip((k, v), cache.static[call], strict=True):
            scale = None if scale is None else scale[:, None]
            for_division.append(new if scale is None else self.divided(new, scale).float() * scale)
        cache.write(call, batch.slots, *for_division)
        keys, values = (stored.to(q.dtype) for stored in cache.read(call, batch.slots[None]))
        rows = [tensor.transpose(1, 2) for tensor in (q[None], keys, values)]
        out = F.scaled_dot_product_attention(*rows, is_causal=True, scale=spec.scale, enable_gqa=True)
        return out.transpose(1, 2)[0].contiguous()


def served(folder: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[LLM], None], **options: Any) -> Tensor:
    """How far log-probabilities through the engine are from those of the writer's logits."""
    llm = LLM(folder, kernel="reference", **OPTIONS, **options)
    prepare(llm)
    reference = load_file(folder / "reference.safetensors")
    distances = []
    for ids, logits in zip(reference["input_ids"], reference["logits"], strict=True):
        with recorded(monkeypatch) as logprobs:
            (output,) = llm.generate([ids.tolist()], SamplingParams(max_tokens=0, prompt_logprobs=0))
            found = logprobs(int(output.request_id))
        distances.append(found - logits.float().log_softmax(-1)[: len(found)])
    return torch.cat(distances).abs()


def as_llmcompressor(llm: LLM) -> None:
    """It divides in bfloat16."""
    llm.engine.runner.backend = WritersAttention(lambda x, scale: x / scale.to(x.dtype))


def as_modelopt(llm: LLM) -> None:
    """It multiplies by the reciprocal, and had other weights (``test_writers``)."""
    llm.engine.runner.backend = WritersAttention(lambda x, scale: x.float() * (1 / scale))
    moved = load_file(MODELOPT / "before_export.safetensors")
    for layer in quantized(llm.engine.loaded.model):
        before_export(layer, moved[layer.name])


@pytest.mark.parametrize(("folder", "prepare"), [(LLMC, as_llmcompressor), (MODELOPT, as_modelopt)])
def test_the_engine_gives_the_writers_logits_with_the_writers_scales(
    folder: Path, prepare: Callable[[LLM], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = served(folder, monkeypatch, prepare)
    without = served(folder, monkeypatch, prepare, kv_cache_dtype="bf16")
    assert found.max() < NOISE["max"]
    assert found.mean() < NOISE["mean"] < without.mean() / 2


def report(folder: Path, **options: Any) -> str:
    (line,) = [line for line in LLM(folder, **OPTIONS, **options).report.splitlines() if line.startswith("kv cache")]
    return line


def test_the_report_says_which_scales_are_used() -> None:
    assert "in float8_e4m3fn (as the checkpoint asks, 4 static scales of the checkpoint)" in report(MODELOPT)
    assert "in float8_e4m3fn (4 static scales of the checkpoint)" in report(LLMC, kv_cache_dtype="fp8_e4m3")
    assert "in bfloat16 (4 scales of the checkpoint are for fp8_e4m3 and left out)" in report(
        LLMC, kv_cache_dtype="bf16"
    )
    assert "in int8 (scales per token and head; 4 scales of the ch" in report(MODELOPT, kv_cache_dtype="int8")
    plain = CHECKPOINTS / "compressed-tensors--fp8-static"
    assert "in bfloat16;" in report(plain)
    assert "(scales per token and head: none are stored)" in report(plain, kv_cache_dtype="fp8_e4m3")


def copy(folder: Path, scales: dict[str, Tensor | None], **quantization: Any) -> Path:
    """LLMC with other scales (``None``: without it) and other entries in its quantization configuration."""
    shutil.copytree(LLMC, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, scale in scales.items():
        tensors.pop(name) if scale is None else tensors.update({name: scale})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor([torch.nan]), "is nan, no scale"),
        (torch.tensor([torch.inf]), "is inf, no scale"),
        (torch.tensor([0.0]), "is 0, no scale"),
        (torch.tensor([0.5, -1.0]), "is -1, no scale"),
        (torch.ones(3), "holds 3 scales, the layer has 2 key heads"),
    ],
)
def test_what_is_no_scale_is_refused_by_name(scale: Tensor, message: str, tmp_path: Path) -> None:
    folder = copy(tmp_path / "model", {SCALE: scale})
    with pytest.raises(LoadError, match=rf"{SCALE} {message}.*--kv-cache-dtype bf16"):
        LLM(folder, **OPTIONS)
    assert "left out" in report(folder, kv_cache_dtype="bf16")


def test_scales_that_belong_to_nothing_or_do_not_stand_alone_are_refused(tmp_path: Path) -> None:
    one, attention = torch.ones(1), "model.layers.1.self_attn"
    for place, (extra, message) in enumerate(
        {
            "model.layers.7.self_attn.k_scale": "1 scales of keys and values belong to no attention",
            f"{attention}.k_zero_point": f"{attention}.k_zero_point is not zero",
            f"{attention}.k_proj.k_scale": "scale the same keys or values",
        }.items()
    ):
        with pytest.raises(LoadError, match=message):
            LLM(copy(tmp_path / str(place), {extra: one}), **OPTIONS)


def test_scales_of_one_of_each_head_for_both_and_missing_ones(tmp_path: Path) -> None:
    first, second = "model.layers.0.self_attn", "model.layers.1.self_attn"
    heads, both = torch.tensor([0.25, 0.5]), torch.tensor(2.0)
    scales = {SCALE: heads.view(2, 1, 1), f"{first}.v_scale": None, f"{first}.k_scale": None, f"{first}.kv_scale": both}
    scales |= {f"{second}.v_scale": None, f"{second}.k_zero_point": torch.zeros(1)}
    llm = LLM(copy(tmp_path / "model", scales), **OPTIONS)
    k, v = llm.engine.runner.cache.static[0]
    assert k is not None
    assert v is not None
    assert k.tolist() == v.tolist() == [2.0, 2.0]
    k, v = llm.engine.runner.cache.static[1]
    assert k is not None
    assert k.tolist() == heads.tolist()
    assert v is None
    assert "3 static scales of the checkpoint, 1 others per token and head" in llm.report


def test_a_scale_of_one_rounds_keys_as_they_are(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in (0, 1) for part in "kv"]
    llm = LLM(copy(tmp_path / "model", {name: torch.ones(1) for name in names}), **OPTIONS)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1))
    cache, block = llm.engine.runner.cache, llm.engine.runner.cache.k_scale[1]
    used = block[:, :, 0] == 1.0
    assert int(used.sum()) >= 3
    assert cache.k[1][used].float().abs().max() > 1, "keys as they are, not spread over all codes"
    assert cache.k[1][used].float().abs().max() < 100


def test_another_scheme_than_fp8_leaves_its_scales_out(tmp_path: Path) -> None:
    folder = copy(tmp_path / "model", {}, kv_cache_scheme={"num_bits": 8, "type": "int", "strategy": "tensor"})
    assert "in bfloat16 (4 scales of the checkpoint are for int8 and left out" in report(folder)
    fp8 = report(folder, kv_cache_dtype="fp8_e4m3")
    assert "(scales per token and head; 4 scales of the checkpoint are for int8 and left out" in fp8


CACHE_ONLY = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
    "modelopt-side-file": {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": []}},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    },
}


@pytest.mark.parametrize("writer", CACHE_ONLY)
def test_checkpoints_that_quantize_nothing_but_keys_and_values(writer: str, tmp_path: Path) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer, part in product(range(3), "kv"):
        own = f"{part}_scale" if writer == "compressed-tensors" else f"{part}_proj.{part}_scale"
        tensors[f"model.layers.{layer}.self_attn.{own}"] = torch.tensor(0.05)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    if writer.endswith("side-file"):
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(CACHE_ONLY[writer]))
    else:
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": CACHE_ONLY[writer]}))
    model, ids = load_model(tmp_path, dtype="float32"), torch.arange(5, 25)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    assert "(as the checkpoint asks, 6 static scales of the checkpoint)" in report(tmp_path, dtype="float32")
    assert inspect(tmp_path).data()["quantization"] == writer.removesuffix("-side-file")
    codes = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    codes["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    codes["model.layers.1.mlp.up_proj.weight_scale"] = torch.tensor(1.0)
    save_file(codes, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"layers\.1\.mlp\.up_proj.* (says quant_algo: none|no target)"):
        inspect(tmp_path)


def test_evaluation_goes_through_the_cache_that_would_be_served() -> None:
    ids = load_file(LLMC / "reference.safetensors")["input_ids"][0].tolist()
    options: dict[str, Any] = {"dtype": "float32", "weight_only": True}
    asked, fp8, plain = (
        Scorer(EngineConfig(str(LLMC), kv_cache_dtype=name, tokenizer="demo", **options)).logits(ids)
        for name in ("auto", "fp8_e4m3", "fp32")
    )
    assert torch.equal(asked, fp8)
    assert (asked - plain).abs().max() > 0.01
    served = torch.tensor(LLM(LLMC, **OPTIONS, **options).score(ids).logprobs[1:])
    evaluated = asked.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(evaluated, served, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("m.0.self_attn.k_scale", ("m.0.self_attn", "k")),
        ("m.0.self_attn.attn.v_scale", ("m.0.self_attn", "v")),
        ("h.0.attn.kv_scale", ("h.0.attn", "kv")),
        ("m.0.self_attn.v_proj.v_scale", ("m.0.self_attn", "v")),
        ("m.0.self_attn.k_proj.output_scale", ("m.0.self_attn", "k")),
        ("m.0.attention.v_fake_quantizer.qscale_act", ("m.0.attention", "v")),
        ("m.0.self_attn.q_scale", None),
        ("m.0.self_attn.k_zero_point", None),
        ("m.0.self_attn.q_proj.output_scale", None),
        ("m.0.self_attn.qkv_proj.output_scale", None),
        ("m.0.self_attn.k_proj.weight_scale", None),
    ],
)
def test_names(name: str, found: tuple[str, str] | None) -> None:
    assert kv_scale_of(name) == (found and KVScale(*found))


def test_what_configurations_ask_for() -> None:
    float8 = {"num_bits": 8, "type": "float"}
    assert kv_cache_asked(None) is None
    assert kv_cache_asked({"kv_cache_scheme": None}) is None
    for config in (
        {"kv_cache_scheme": float8},
        {"kv_cache_scheme": "static"},
        {"kv_cache_quant_algo": "FP8"},
        {"quantization": {"kv_cache_quant_algo": "FP8"}},
        {"quantization_config": {"kv_cache_scheme": float8}},
    ):
        assert kv_cache_asked(config) == "fp8_e4m3"
    assert kv_cache_asked({"kv_cache_scheme": {"num_bits": 8, "type": "int"}}) == "int8"
    assert kv_cache_asked({"kv_cache_quant_algo": "NVFP4"}) == "nvfp4"
