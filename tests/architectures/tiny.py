"""A tiny configuration of every architecture that Transformers' causal mapping names, shaped so that mistakes show.

Most configuration classes use the same names for the same things, so one table of sizes fits them: :data:`SIZES` is
applied to whatever fields a class has, and lists with an entry per layer are shortened to one of each kind in turn. Types
that need more have it in :data:`OVERRIDES`, as data.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
LAYERS = 4
WINDOW = 4

SIZES: dict[str, Any] = {
    # width
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim_model": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dff": 48,
    "dim_ff": 48,
    "n_inner": 48,
    "shared_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "word_embed_proj_dim": 32,
    # depth
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "encoder_layers": 1,
    "decoder_layers": LAYERS,
    # heads
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "attention_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "swa_v_head_dim": 8,
    "rotary_dim": 4,
    "dim_head": 8,
    "kv_channels": 8,
    "attention_hidden_size": 32,
    # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 10,
    # what a layer may see
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": 5,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "query_pre_attn_scalar": 5,
    "attn_logit_softcapping": 0.7,
    "final_logit_softcapping": 20.0,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "num_expert_group": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "first_k_dense_replace": 1,
    # recurrent layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_chunk_size": 8,
    "n_mamba_heads": 2,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    # sequences and vocabulary
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}

_LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}
"""Of multi-head latent attention: every head has keys of its own, and the rotary embedding reads ``head_dim``."""

_GEMMA4: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "falcon_h1": {"time_step_limit": (0.3, 0.8), "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 1.3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2, "ffn_hidden_size": 48},
    "mamba2": {"num_heads": 8, "time_step_limit": (0.3, 0.8)},
    "nemotron_h": {"time_step_min": 0.5},  # many time steps are shorter
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_embds_dim": (16, 16)},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba2": {"time_step_min": 0.5},  # as nemotron_h
    "zamba": {"attention_head_dim": 16, "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}
"""Options of single types, on top of :data:`SIZES`; those of a part of the model under the part's name."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of a type."""
    return AutoConfig.for_model(model_type, **_options(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {})))


def _options(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    whole = kind()
    fields = {field.name for field in dataclasses.fields(kind)}
    options = {name: size for name, size in SIZES.items() if name in fields and vars(whole).get(name) is not None}
    if "head_dim" in fields:
        options["head_dim"] = SIZES["head_dim"]
    if "kv_lora_rank" in options:
        options |= _LATENT
    layers = getattr(whole, "num_hidden_layers", None)
    for name, value in vars(whole).items():
        if isinstance(value, list) and len(value) == layers and isinstance(value[0], str | int):
            kinds = list(dict.fromkeys(value))
            options[name] = (kinds * LAYERS)[:LAYERS]
    for name in whole.sub_configs:
        if isinstance(part := getattr(whole, name, None), PreTrainedConfig):
            options[name] = _options(type(part), overrides.get(name, {}))
    return options | {name: value for name, value in overrides.items() if name not in whole.sub_configs}
