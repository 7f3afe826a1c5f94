"""Layers that keep less than keys and values: latents, and nothing where another layer's are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention

from attention import (
    NAME,
    AttentionBatch,
    AttentionError,
    KVCache,
    UnsupportedAttention,
    expansion,
    forward_batch,
    read_specs,
)
from attention.cpu import CpuBackend
from attention.expansion import worth_expanding
from attention.hf import prepare, read_layers
from attention.latent import Projection
from attention.reference import ReferenceBackend
from quant.kernels import native
from tests.architectures.sweep import eager_model
from tests.architectures.tiny import tiny_config as tiny_architecture
from tests.attention.paging import tensors_of
from tests.attention.serving import alone, relative_error, serve
from tests.attention.test_hf import MIXED, PROMPTS, TOLERANCE
from tests.tiny_models import tiny_config, tiny_model

LATENT = (
    "axk1",
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "kimi_linear",
    "longcat_flash",
    "minicpm3",
    "youtu",
)
"""Every type of Transformers' causal mapping with latent attention that is served; the sweep compares their answers."""


def allocated(cache: KVCache) -> int:
    """Bytes, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(cache)}.values())


@pytest.mark.parametrize("model_type", LATENT)
def test_a_token_costs_its_latent_and_its_rotated_key(model_type: str) -> None:
    config = tiny_architecture(model_type)
    specs = read_layers(config).attention
    assert len(specs) >= 2
    cost = len(specs) * (config.kv_lora_rank + config.qk_rope_head_dim) * torch.bfloat16.itemsize
    assert KVCache.bytes_per_token(specs, torch.bfloat16) == cost
    assert allocated(KVCache(specs, 5, 3, torch.bfloat16, "cpu")) == 5 * 3 * cost


def projection() -> Projection:
    """Of DeepSeek-V3."""
    return Projection(torch.empty(128, 128 + 128, 512, device="meta"), 128)


def test_prompts_are_expanded_and_short_pieces_after_a_long_past_are_not() -> None:
    wanted = {(1, 1): False, (1, 8192): False, (2, 2): True, (512, 512): True, (100, 8192): False, (512, 8192): True}
    assert {(q, kv): worth_expanding(projection(), q, kv) for q, kv in wanted} == wanted


@pytest.mark.parametrize("expanding", [True, False])
@pytest.mark.parametrize("most_bytes", [1, 1 << 20])
def test_expanded_or_absorbed_the_answers_are_the_same(
    expanding: bool, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole prompts, and pieces beside decoding sequences; of few bytes, a head after the other."""
    seen = []

    def decide(projection: Projection, queries: int, keys: int) -> bool:
        seen.append((queries, keys))
        return expanding and queries > 1

    monkeypatch.setattr(expansion, "worth_expanding", decide)
    monkeypatch.setattr(expansion, "MOST_BYTES", most_bytes)
    model, eager = tiny_model("deepseek_v3", NAME), tiny_model("deepseek_v3", "eager")
    for backend in (ReferenceBackend(), CpuBackend(native.build)):
        got = serve(model, read_specs(tiny_config("deepseek_v3")), PROMPTS, MIXED, backend)
        for logits, prompt in zip(got, PROMPTS, strict=True):
            assert relative_error(logits, alone(eager, prompt)) < TOLERANCE
    assert {(6, 6), (5, 5), (5, 11), (1, 5)} <= set(seen)


def expanded() -> list[tuple[int, int, int]]:
    return [(spec.kv_heads, spec.key_dim, spec.value_dim) for spec in read_specs(tiny_config("deepseek_v3"))]


def other_values(original: Any) -> Any:
    def method(self: nn.Module, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = original(self, latent, rotated)
        return keys, values.tanh()

    return method


def other_order(original: Any) -> Any:
    """The rotated part comes first, in queries as in keys: as good, and something else."""

    def method(self: nn.Module, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = original(self, latent, rotated)
        return keys.roll(self.qk_rope_head_dim, -1), values

    return method


def other_numbers(original: Any) -> Any:
    def method(self: nn.Module, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        assert self.kv_b_proj.weight.shape[0] == 4 * 18
        return original(self, 0.5 * latent, rotated)

    return method


def failing(original: Any) -> Any:
    def method(self: nn.Module, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        if not latent.is_meta and latent.shape[2] == 2:
            raise ValueError("it needs more than that")
        return original(self, latent, rotated)

    return method


@pytest.mark.parametrize("change", [other_values, other_order, other_numbers, failing])
def test_a_layer_that_expands_otherwise_keeps_what_it_expanded(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepseekV3Attention, "expand_kv", change(DeepseekV3Attention.expand_kv))
    assert expanded() == [(4, 12, 10)] * 3
    got = serve(tiny_model("deepseek_v3", NAME), read_specs(tiny_config("deepseek_v3")), PROMPTS, MIXED)
    eager = tiny_model("deepseek_v3", "eager")
    for logits, prompt in zip(got, PROMPTS, strict=True):
        assert relative_error(logits, alone(eager, prompt)) < TOLERANCE


def test_keys_that_are_changed_after_they_were_expanded_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    original = DeepseekV3Attention.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        answered = self.expand_kv
        self.__dict__["expand_kv"] = lambda *latents: tuple(tensor.clone() for tensor in answered(*latents))
        try:
            return original(self, *args, **kwargs)
        finally:
            self.__dict__["expand_kv"] = answered

    monkeypatch.setattr(DeepseekV3Attention, "forward", forward)
    assert expanded() == [(4, 12, 10)] * 3


def test_keys_expanded_by_another_layer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original, first = DeepseekV3Attention.forward, {}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        answered = self.expand_kv
        if self.layer_idx:
            self.__dict__["expand_kv"] = lambda *latents: first["made"]
        else:
            self.__dict__["expand_kv"] = lambda *latents: first.setdefault("made", answered(*latents))
        try:
            return original(self, *args, **kwargs)
        finally:
            self.__dict__["expand_kv"] = answered

    monkeypatch.setattr(DeepseekV3Attention, "forward", forward)
    with pytest.raises(UnsupportedAttention, match="keys and values that another layer expanded"):
        read_specs(tiny_config("deepseek_v3"))


def run(model: nn.Module, specs: list[Any]) -> None:
    batch = AttentionBatch.pack([3], [3], [[0]], 4)
    cache = KVCache(specs, 1, 4, torch.float32, "cpu")
    with torch.no_grad(), forward_batch(batch, cache, ReferenceBackend(), specs):
        model(torch.ones(1, 3, dtype=torch.long), position_ids=batch.positions()[None], use_cache=False)


def test_a_model_that_was_not_prepared_is_not_served_over_latents() -> None:
    with pytest.raises(AttentionError, match=r"brings keys of its own, but .* latent"):
        run(tiny_model("deepseek_v3", NAME), read_specs(tiny_config("deepseek_v3")))


def test_a_projection_that_is_not_dense_cannot_be_absorbed() -> None:
    model = tiny_model("deepseek_v3", NAME)
    prepare(model)
    specs = read_specs(tiny_config("deepseek_v3"))
    run(model, specs)
    projection = model.model.layers[1].self_attn.kv_b_proj
    projection.bias = nn.Parameter(torch.zeros(projection.out_features))
    with pytest.raises(AttentionError, match="kv_b_proj must be dense, without bias"):
        run(model, specs)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_and_values_keep_none(model_type: str) -> None:
    specs = read_specs(tiny_architecture(model_type))
    assert [spec.shares for spec in specs] == [None, None, 0, 1]
    assert [spec.window for spec in specs] == [4, None, 4, None]
    own = sum(spec.kv_heads * (spec.key_dim + spec.value_dim) for spec in specs[:2])
    assert KVCache.bytes_per_token(specs, torch.float32) == 4 * own
    assert allocated(KVCache(specs, 5, 3, torch.float32, "cpu")) == 5 * 3 * 4 * own


def test_a_layer_that_stops_sharing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = read_specs(tiny_architecture("gemma4_text"))
    model = eager_model("gemma4_text")
    model.set_attn_implementation(NAME)
    run(model, specs)
    original = Gemma4TextAttention.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        shared = kwargs["shared_kv_states"]
        if self.layer_idx == 3:
            shared[self.layer_type] = tuple(tensor + 0 for tensor in shared[self.layer_type])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Gemma4TextAttention, "forward", forward)
    with pytest.raises(AttentionError, match=r"brings keys of its own, but .* of another layer"):
        run(model, specs)
