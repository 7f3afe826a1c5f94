"""2:4 sparse checkpoints that are not quantized: every weight comes back, through the model and the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime import LLM, LoadError, SamplingParams, inspect, load_model
from tests.tiny_models import tiny_model

SPARSE = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """By plain loops: the two numbers of each four that are kept, and a bit for each place, the first one the lowest."""
    numbers, masks = [], []
    for row in weight.tolist():
        kept = [row[i] != 0 for i in range(len(row))]
        for start in range(0, len(row), 4):  # two of four are kept even where they are zero
            for i in range(start, start + 4):
                if sum(kept[start : start + 4]) < 2:
                    kept[i] = True
        numbers.append([value for value, keep in zip(row, kept, strict=True) if keep])
        masks.append([sum(keep << i for i, keep in enumerate(kept[at : at + 8])) for at in range(0, len(row), 8)])
    return torch.tensor(numbers), torch.tensor(masks, dtype=torch.uint8)


def write(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model of which two of four weights are left; its dense tensors."""
    tiny_model("llama").to(dtype).save_pretrained(folder)
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        four = weight.unflatten(1, (-1, 4))
        least = four.abs().topk(2, dim=-1, largest=False).indices
        weight = four.scatter(-1, least, 0).flatten(1)
        weight[0, :4] = 0
        weight[1, 3] = -0.0
        numbers, bits = packed(weight.float())
        layer = name.removesuffix(".weight")
        tensors |= {f"{layer}.compressed": numbers.to(dtype), f"{layer}.bitmask": bits}
        tensors[f"{layer}.shape"] = torch.tensor(weight.shape)[:, None]
        dense[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": SPARSE}
    (folder / "config.json").write_text(json.dumps(config))
    return dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_weight_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    dense = write(tmp_path, dtype)
    plan = inspect(tmp_path).plan
    assert len(plan.sparse) == len(dense) > 7
    assert "2:4 sparse" in plan.sparse[0].reason
    model = load_model(tmp_path, dtype=dtype)
    for name, weight in dense.items():
        assert torch.equal(model.get_parameter(name), weight), name
    llm = LLM(tmp_path, dtype=dtype, skip_tokenizer_init=True, max_total_tokens=64, startup_check=False)
    (output,) = llm.generate([[3, 4, 5]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    with torch.inference_mode():
        assert output.outputs[0].token_ids == [int(model(torch.tensor([[3, 4, 5]])).logits[0, -1].argmax())]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.bitmask"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"model\.layers\.0\.mlp\.up_proj\.bitmask is missing"):
        load_model(tmp_path)
