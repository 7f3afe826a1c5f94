"""A random Llama of a given shape, as bf16 and as AWQ int4, for measuring speed: the values mean nothing.

Both are written without ever holding the whole model, so a shape of 1B parameters needs little memory and a few seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with tied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    group: int = 128
    """Inputs that share a scale, quantized."""

    @property
    def linears(self) -> list[tuple[str, int, int]]:
        """``(name, inputs, outputs)`` of one layer's linear layers."""
        hidden, head = self.hidden, self.hidden // self.heads
        return [
            ("self_attn.q_proj", hidden, self.heads * head),
            ("self_attn.k_proj", hidden, self.kv_heads * head),
            ("self_attn.v_proj", hidden, self.kv_heads * head),
            ("self_attn.o_proj", self.heads * head, hidden),
            ("mlp.gate_proj", hidden, self.intermediate),
            ("mlp.up_proj", hidden, self.intermediate),
            ("mlp.down_proj", self.intermediate, hidden),
        ]

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linears, the head included."""
        return self.layers * sum(i * o for _, i, o in self.linears) + self.hidden * self.vocabulary


LLAMA_1B = Shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=128256)
"""Llama-3.2-1B."""
LLAMA_135M = Shape(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152, group=64)
"""SmolLM2-135M."""
LLAMA_8B = Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256)
"""Llama-3.1-8B, but for its tied embeddings."""
TINY = Shape(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, vocabulary=1024)
SHAPES = {"1b": LLAMA_1B, "135m": LLAMA_135M, "tiny": TINY}
"""By the name that a command line gives them; "tiny" shows that a benchmark runs."""


def write(shape: Shape, folder: Path, *, quantized: bool, device: str = "cpu") -> Path:
    """Write the checkpoint, one file a layer, and return its folder; ``device`` draws the numbers."""
    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    for number, tensors in enumerate(_parts(shape, quantized, generator)):
        file = f"part-{number:03d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).to_dict()
    if quantized:
        config["quantization_config"] = {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": shape.group, "zero_point": True,
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _parts(shape: Shape, quantized: bool, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    def normal(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, device=generator.device) * 0.02).bfloat16().cpu()

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    yield {"model.embed_tokens.weight": normal(shape.vocabulary, shape.hidden), "model.norm.weight": ones}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{norm}.weight": ones.clone() for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, inputs, outputs in shape.linears:
            if not quantized:
                tensors[f"{prefix}.{name}.weight"] = normal(outputs, inputs)
                continue
            words = (inputs, outputs // 8)
            codes = torch.randint(
                -(2**31), 2**31 - 1, words, generator=generator, dtype=torch.int32, device=generator.device
            )
            tensors[f"{prefix}.{name}.qweight"] = codes.cpu()
            tensors[f"{prefix}.{name}.qzeros"] = torch.full(
                (inputs // shape.group, outputs // 8), -0x77777778, dtype=torch.int32
            )
            tensors[f"{prefix}.{name}.scales"] = torch.full(
                (inputs // shape.group, outputs), 0.004, dtype=torch.float16
            )
        yield tensors
