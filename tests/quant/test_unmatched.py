"""Entries of skip lists and targets that name nothing, on lists as published checkpoints have them."""

from __future__ import annotations

from typing import Any

import pytest

from quant import registry

NAMES = [
    "lm_head", "model.embed_tokens", "model.norm",
    *(f"model.layers.{n}.{m}" for n in range(2) for m in (
        "input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj",
        "mlp", "mlp.gate", "mlp.gate_proj", "mlp.down_proj",
    )),
]  # fmt: skip

INT4 = {"weights": {"num_bits": 4, "group_size": 128}}
LISTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    # Qwen/Qwen3-30B-A3B-FP8 lists norms and routers by full name
    "qwen3-fp8": (
        {
            "quant_method": "fp8", "weight_block_size": [128, 128],
            "modules_to_not_convert": [
                "lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate", "model.layers.47.mlp.gate",
            ],
        },
        ["modules_to_not_convert: model.layers.47.mlp.gate"],
    ),
    # neuralmagic/Meta-Llama-3-8B-Instruct-FP8
    "autofp8": ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, []),
    # unsloth's dynamic 4-bit checkpoints list towers that a text model does not have
    "unsloth-bnb": (
        {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "llm_int8_skip_modules": [
                "lm_head", "multi_modal_projector", "merger", "modality_projection", "model.layers.1.mlp",
            ],
        },
        ["llm_int8_skip_modules: " + name for name in ("multi_modal_projector", "merger", "modality_projection")],
    ),
    # RedHatAI's and llm-compressor's own recipes
    "llm-compressor": (
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {
                "group_0": INT4 | {"targets": ["Linear"]},
                "group_1": INT4 | {"targets": ["re:.*self_attn\\.(q|k|v|o)_proj$", "re:.*block_sparse_moe\\.experts.*"]},
            },
            "ignore": ["lm_head", "re:.*mlp.gate$", "re:vision_tower.*", "model.layers.1.mlp.gate"],
        },
        ["ignore: re:vision_tower.*", "config_groups: group_1: targets: re:.*block_sparse_moe\\.experts.*"],
    ),
    # nvidia/DeepSeek-R1-FP4, hf_quant_config.json: whole layers by wildcard, the last one is its prediction layer
    "modelopt": (
        {
            "quantization": {
                "quant_algo": "NVFP4",
                "exclude_modules": ["lm_head", "model.layers.1.self_attn*", "model.layers.61*", "model.embed_tokens"],
            }
        },
        ["exclude_modules: model.layers.61*"],
    ),
    "modelopt-mixed": (
        {
            "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": ["*embed*", "output_layer"],
            "quantized_layers": {
                "model.layers.0.mlp.gate_proj": {"quant_algo": "FP8"}, "model.layers.7.mlp.gate_proj": {"quant_algo": "FP8"},
            },
        },
        ["ignore: output_layer", "quantized_layers: model.layers.7.mlp.gate_proj"],
    ),
    # Qwen/Qwen2.5-VL-7B-Instruct-AWQ
    "awq-vl": ({"quant_method": "awq", "modules_to_not_convert": ["visual"]}, ["modules_to_not_convert: visual"]),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {r"-:.*\.gate$": {}, r"+:.*\.experts\..*": {"bits": 8}}},
        [r"dynamic: +:.*\.experts\..*"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_only_entries_in_vain_are_reported(name: str) -> None:
    config, expected = LISTS[name]
    method = registry.resolve(config, {})
    assert method.unmatched(NAMES) == expected
    assert method.unmatched(iter(NAMES)) == expected, "names may come from an iterator"
