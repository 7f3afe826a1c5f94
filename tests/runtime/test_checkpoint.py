"""What a folder can do wrong, and what the message says. No weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.checkpoint import Checkpoint, locate, read_header
from runtime.errors import LoadError
from runtime.loader import load_model

AWQ = Path(__file__).parents[1] / "checkpoints" / "autoawq--gemm-g128"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A private copy of a real AWQ checkpoint."""
    return Path(shutil.copytree(AWQ, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> Path:
    """Split ``model.safetensors`` in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    weights = {name: file for file, chosen in parts.items() for name in chosen}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return index


def test_headers_are_those_of_the_file() -> None:
    header = read_header(AWQ / "model.safetensors")
    tensors = load_file(AWQ / "model.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == dict(header)


def test_shards_read_like_one_file(folder: Path) -> None:
    whole = Checkpoint.open(folder).tensors
    shard(folder)
    assert Checkpoint.open(folder).tensors == whole


def test_a_missing_folder_names_the_possibilities(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no such folder.*OWNER/NAME.*demo"):
        locate(str(tmp_path / "nothing"))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"config\.json is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", '"x"', "[" * 100_000])
def test_damaged_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(LoadError, match=r"config\.json.*damaged"):
        Checkpoint.open(folder)


# GGUF: by extension, magic bytes, quant_method and folder content


@pytest.mark.parametrize("name", ["model.gguf", "MODEL-Q4_K_M.GGUF", "owner/repo:Q4_K_M"])
def test_gguf_by_name(name: str) -> None:
    with pytest.raises(LoadError, match=r"GGUF is not supported, by design.*dequantize=True"):
        Checkpoint.open(name)


def test_gguf_by_magic_bytes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"GGUF\x03\x00\x00\x00rest")
    with pytest.raises(LoadError, match="GGUF is not supported"):
        Checkpoint.open(path)


def test_gguf_by_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q4.gguf")
    with pytest.raises(LoadError, match=r"model\.Q4\.gguf: GGUF is not supported"):
        Checkpoint.open(folder)


def test_gguf_by_quant_method(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "GGUF"})
    with pytest.raises(LoadError, match=r"quant_method gguf\): GGUF is not supported"):
        Checkpoint.open(folder)


def test_gguf_beside_safetensors_is_left_alone(folder: Path) -> None:
    (folder / "other.gguf").write_bytes(b"GGUF")
    assert Checkpoint.open(folder).tensors


# Weights


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"only pickled weights \(pytorch_model\.bin\).*runs code"):
        Checkpoint.open(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"neither model\.safetensors nor.*config\.json"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoadError, match=r"model\.safetensors: .*damaged or truncated \(\d+ bytes\)"):
        Checkpoint.open(folder)


def write_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1], "not a JSON object"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"8 bytes, but spans 4"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**63]}}, "but spans"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "ends at byte"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "malformed"),
        ({"a": {"dtype": "F5", "shape": [1], "data_offsets": [0, 1]}}, "dtype F5"),
        (
            {
                "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            "a and b overlap",
        ),
    ],
)
def test_a_header_that_lies(folder: Path, header: object, message: str) -> None:
    write_header(folder / "model.safetensors", header, bytes(8))
    with pytest.raises(LoadError, match=message):
        Checkpoint.open(folder)


def test_a_header_length_beyond_the_file(folder: Path) -> None:
    write_header(folder / "model.safetensors", {}, length=2**63)
    with pytest.raises(LoadError, match=r"claims 9223372036854775808 bytes"):
        Checkpoint.open(folder)


def test_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(LoadError, match=r"names b\.safetensors, which is missing"):
        Checkpoint.open(folder)


def test_a_tensor_that_no_shard_holds(folder: Path) -> None:
    index = shard(folder)
    weights = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weights | {"model.extra.weight": "a.safetensors"})
    with pytest.raises(LoadError, match=r"1 tensors that no shard holds, e\.g\. model\.extra\.weight"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_does_not_leave_the_folder(folder: Path, name: str) -> None:
    index = shard(folder)
    edit_json(index, weight_map={"x": name})
    with pytest.raises(LoadError, match="not a plain file name"):
        Checkpoint.open(folder)


def test_shards_load_like_one_file(folder: Path) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        whole = load_model(folder, dtype="float32")(ids).logits
        index = shard(folder)
        assert torch.equal(load_model(folder, dtype="float32")(ids).logits, whole)
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(LoadError, match='has no "metadata"'):
        load_model(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    index = shard(folder)
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "c.safetensors")
    weights = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weights | {"another": "c.safetensors"})
    with pytest.raises(LoadError, match=r"lm_head\.weight is stored in another shard"):
        Checkpoint.open(folder)


# Names of auto-gptq


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    """A private copy of a checkpoint whose file is called gptq_model-4bit-32g.safetensors."""
    return Path(shutil.copytree(AWQ.parent / "auto-gptq--w4g32-desc", tmp_path / "gptq"))


GPTQ_FILE = "gptq_model-4bit-32g.safetensors"


@pytest.mark.parametrize("name", [GPTQ_FILE, "gptq_model-other.safetensors", "model.safetensors"])
def test_the_names_of_auto_gptq_are_found(gptq: Path, name: str) -> None:
    (gptq / GPTQ_FILE).rename(gptq / name)
    assert Checkpoint.open(gptq).weights == name


def test_a_base_name_outranks_every_other(gptq: Path) -> None:
    shutil.copy(gptq / GPTQ_FILE, gptq / "mine.safetensors")
    assert Checkpoint.open(gptq).weights == GPTQ_FILE
    config = json.loads((gptq / "config.json").read_text())
    config["quantization_config"]["model_file_base_name"] = "mine"
    (gptq / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(gptq).weights == "mine.safetensors"
    config["quantization_config"]["model_file_base_name"] = "../gptq/mine"
    (gptq / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(gptq).weights == GPTQ_FILE, "a base name does not leave the folder"


def test_a_base_name_that_only_the_side_file_has(gptq: Path) -> None:
    (gptq / GPTQ_FILE).rename(gptq / "mine.safetensors")
    shutil.copy(gptq / "mine.safetensors", gptq / "other.safetensors")
    with pytest.raises(LoadError, match="neither"):
        Checkpoint.open(gptq)
    side = json.loads((gptq / "quantize_config.json").read_text())
    (gptq / "quantize_config.json").write_text(json.dumps(side | {"model_file_base_name": "mine"}))
    assert Checkpoint.open(gptq).weights == "mine.safetensors"


@pytest.mark.parametrize("name", ["awq_model_w4_g128", "wizard-13B-GPTQ", "pygmalion-4bit-32g"])
def test_a_single_file_whose_name_speaks_of_a_quantization(gptq: Path, name: str) -> None:
    (gptq / GPTQ_FILE).rename(gptq / f"{name}.safetensors")
    assert Checkpoint.open(gptq).weights == f"{name}.safetensors"
    (gptq / f"{name}.safetensors").rename(gptq / f"{name}-00001-of-00002.safetensors")
    with pytest.raises(LoadError, match="neither"):
        Checkpoint.open(gptq)


def test_several_quantized_models_in_a_folder(gptq: Path) -> None:
    for name in ("gptq_model-a.safetensors", "gptq_model-b.safetensors"):
        shutil.copy(gptq / GPTQ_FILE, gptq / name)
    (gptq / GPTQ_FILE).unlink()
    with pytest.raises(LoadError, match=r"several quantized models: gptq_model-a.*model_file_base_name"):
        Checkpoint.open(gptq)


def test_shards_under_the_name_of_auto_gptq(gptq: Path) -> None:
    whole = Checkpoint.open(gptq)
    tensors = load_file(gptq / GPTQ_FILE)
    stem, names = GPTQ_FILE.removesuffix(".safetensors"), sorted(tensors)
    weights = {name: f"{stem}-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(names)}
    for file in set(weights.values()):
        save_file({name: tensors[name] for name in names if weights[name] == file}, gptq / file)
    (gptq / GPTQ_FILE).unlink()
    (gptq / f"{GPTQ_FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    assert Checkpoint.open(gptq).tensors == whole.tensors


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "gptq"),
        ("quantize_config.json", {"bits": 4, "method": "awq", "format": "gemm"}, "awq"),
        ("quantize_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq"),
        ("quantization_config.json", {"bits": 4, "quant_method": "auto-round"}, "auto-round"),
    ],
)
def test_side_files_mean_the_method_of_their_writer(
    folder: Path, file: str, content: dict[str, Any], method: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_text(json.dumps(content))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.quantization == content | {"quant_method": method}
    assert checkpoint.quantization_source == file


# Configuration


def test_the_quantization_config_is_found_where_tools_put_it(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    nested = config | {"text_config": {"quantization_config": quantization}}
    old = config | {"compression_config": quantization}
    for written, where in ((nested, "text_config"), (old, "compression_config")):
        (folder / "config.json").write_text(json.dumps(written))
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.quantization == quantization
        assert where in checkpoint.quantization_source
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(folder).quantization is None
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    assert Checkpoint.open(folder).quantization == quantization


def test_remote_code_is_seen_without_being_run(folder: Path) -> None:
    assert Checkpoint.open(folder).remote_code() == []
    edit_json(folder / "config.json", text_config={"auto_map": {"AutoConfig": "evil.Config"}})
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    assert Checkpoint.open(folder).remote_code() == ["config.json", "tokenizer_config.json"]
