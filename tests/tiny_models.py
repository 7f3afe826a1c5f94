"""Tiny random models of many architectures, small enough for a test and shaped so that mistakes show.

Windows and chunks are shorter than the prompts of the tests, softcaps are low enough to bend every score, sinks take a
good share of the softmax, and weights are large enough that tokens attend to each other: forgetting any of it changes the
logits by far more than a tolerance.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 96
WINDOW = 4
CHUNK = 5

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-rope3": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 8}),
    "mixtral": ("mixtral", {"sliding_window": None, **_EXPERTS}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": (
        "glm4_moe",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "head_dim": 8,
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 0.7,
            "final_logit_softcapping": 20.0,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    ),
    "cohere2": ("cohere2", {"sliding_window": WINDOW, "layer_types": _ALTERNATING, "head_dim": 8}),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **_EXPERTS,
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "phimoe": ("phimoe", {"sliding_window": WINDOW, **_EXPERTS}),
    "stablelm": ("stablelm", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("gpt_neox", {}),
    "diffllama": ("diffllama", {}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_MLA,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.0,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": CHUNK,
            "no_rope_layers": [1, 0, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "moe_layers": [1],
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attn_temperature_tuning": True,
            "floor_scale": 3,
            "attn_scale": 0.7,
        },
    ),
}


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The config of an architecture of :data:`ARCHITECTURES`, with ``changes`` on top."""
    model_type, own = ARCHITECTURES[name]
    return AutoConfig.for_model(model_type, **{**_COMMON, **own, **changes})


def tiny_model(
    name: str, attn_implementation: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """The model of :func:`tiny_config`, the same weights for every attention implementation."""
    config = tiny_config(name, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
    return randomize(model).to(dtype).eval()


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights under which every token matters: matrices keep the size of what they multiply, vectors are disturbed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if "embed" in name or "wte" in name:
            parameter.copy_(normal(parameter))
        elif parameter.ndim > 1:
            parameter.copy_(normal(parameter) * 1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(normal(parameter) * 0.3)
    return model
