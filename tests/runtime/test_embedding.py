"""Embeddings that are stored quantized: looked up and dequantized row by row, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.base import LinearShape, NoKernel, Scheme, WeightKind
from quant.embedding import QuantEmbedding, lookup
from quant.linear import QuantLinear
from runtime import LLM, SamplingParams, inspect, load_model
from runtime.errors import LoadError
from tests.packers import pack_rows
from tests.tiny_models import tiny_model

IDS = torch.arange(24).reshape(2, 12)
EMBEDDING = "model.embed_tokens"
INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


def compressed(weight: Tensor, args: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """A weight ``[rows, inputs]`` as compressed-tensors stores it, and what it then means."""
    if args["type"] == "float":
        scale = weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale
    grouped = weight.unflatten(1, (-1, 16))
    scale = grouped.abs().amax(-1) / 7.5
    codes = (grouped / scale[..., None]).round().clamp(-8, 7)
    packed = pack_rows(codes.flatten(1).numpy().astype(np.int64) + 8, 4)
    shape = torch.tensor(weight.shape)
    tensors = {"weight_packed": torch.from_numpy(packed), "weight_scale": scale, "weight_shape": shape}
    return tensors, (codes * scale[..., None]).flatten(1)


def write(
    folder: Path, args: dict[str, Any], names: tuple[str, ...], *, tied: bool = False, head: bool = True
) -> Tensor:
    """A Llama whose modules ``names`` are stored quantized, and the logits that it must have."""
    model = tiny_model("llama")
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in names:
        tensors, values = compressed(stored.pop(f"{name}.weight"), args)
        stored |= {f"{name}.{local}": tensor for local, tensor in tensors.items()}
        model.get_submodule(name).weight.data = values
    if not head:
        del stored["lm_head.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    kind = "float-quantized" if args["type"] == "float" else "pack-quantized"
    targets = ["Embedding"] + ["re:.*lm_head"] * ("lm_head" in names)
    config = json.loads((folder / "config.json").read_text()) | {
        "tie_word_embeddings": tied,
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": kind, "version": "0.20.0",
            "config_groups": {"group_0": {"targets": targets, "weights": args}}, "ignore": [],
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("args", [INT4, FP8], ids=["int4", "fp8"])
@pytest.mark.parametrize(
    ("names", "tied"), [((EMBEDDING,), False), ((EMBEDDING, "lm_head"), False), ((EMBEDDING, "lm_head"), True)]
)
def test_rows_are_looked_up(args: dict[str, Any], names: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    """Tied by the configuration, with a head of its own: what is stored decides."""
    expected = write(tmp_path, args, names, tied=tied)
    model = load_model(tmp_path, dtype="float32")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(model.get_submodule("lm_head"), QuantLinear) == ("lm_head" in names)
    assert embedding.quant_weight is not None
    assert embedding.quant_weight.nbytes < 96 * 32 * 1.3
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    row = next(module for module in inspect(tmp_path).data()["modules"] if module["name"] == EMBEDDING)
    assert (row["kernel"], row["in_features"], row["out_features"]) == ("lookup", 32, 96)


def test_the_engine_and_other_dtypes(tmp_path: Path) -> None:
    expected = write(tmp_path, INT4, (EMBEDDING,))
    llm = LLM(tmp_path, dtype="float32", skip_tokenizer_init=True, max_total_tokens=256, startup_check=False)
    found = llm.generate([IDS[1].tolist()], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    assert found[0].outputs[0].token_ids == [int(expected[1, -1].argmax())]
    embedding = load_model(tmp_path, dtype="bfloat16").get_input_embeddings()
    assert embedding(IDS).dtype == torch.bfloat16


def test_a_dense_head_cannot_share_codes(tmp_path: Path) -> None:
    write(tmp_path, INT4, (EMBEDDING,), tied=True, head=False)
    with pytest.raises(LoadError, match=r"lm_head shares the weight of model\.embed_tokens.*stored quantized"):
        inspect(tmp_path)


def test_a_dense_head_of_its_own_stays(tmp_path: Path) -> None:
    expected = write(tmp_path, INT4, (EMBEDDING,), tied=True)
    with torch.inference_mode():
        torch.testing.assert_close(load_model(tmp_path, dtype="float32")(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_scales_over_the_ends_of_rows_are_refused() -> None:
    scheme = Scheme(WeightKind.NF4, (1, 64), flat=True)
    with pytest.raises(NoKernel, match="scales that belong to no row; use a copy"):
        lookup(scheme, LinearShape(96, 10, lookup=True), torch.device("cpu"))
