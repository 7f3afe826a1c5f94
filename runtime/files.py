"""Which files of a folder hold the weights, under all the names that tools give them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import LoadError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SIDE_FILE = "quantize_config.json"
QUANTIZED_FILE = r"(?i).*(gptq|awq|[2-8]-?bit).*\.safetensors(\.index\.json)?"
SHARD = r"-\d+-of-\d+\.safetensors$"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

GGUF_REFUSAL = (
    "{what}: GGUF is not supported, by design. Use the original repository of the model, or dequantize it with "
    "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, "
    "quantization_config=GgufConfig(dequantize=True)).save_pretrained(OUT) and load OUT."
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a :class:`LoadError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"{path} is missing: {path.parent} is not a Transformers checkpoint.") from error
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not valid JSON ({error}). The file is damaged; fetch it again.") from error
    if not isinstance(value, dict):
        raise LoadError(
            f"{path} holds a {type(value).__name__}, not a JSON object. The file is damaged; fetch it again."
        )
    return value


def weights_name(folder: Path, quantization: dict[str, Any]) -> str:
    """The file, or the index of the files, that holds the weights.

    auto-gptq names its file after the quantization, and says so in ``model_file_base_name``, if only in its side file, or
    not at all; it looks in this order itself (auto-gptq 0.7.1, ``modeling/_base.py``). Other names that speak of a
    quantization, as llm-awq's ``awq_model_w4_g128.safetensors``, count if there is one only.
    """
    found = sorted(path.name for path in folder.iterdir())
    side = read_json(folder / SIDE_FILE) if SIDE_FILE in found else {}
    base = quantization.get("model_file_base_name") or side.get("model_file_base_name")
    stems = [base] if isinstance(base, str) and Path(base).name == base else []
    stems += [f"gptq_model-{quantization.get('bits')}bit-{quantization.get('group_size')}g", "model"]
    for stem in stems:
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (folder / name).is_file():
                return name
    others = [name for name in found if re.fullmatch(QUANTIZED_FILE, name) and not re.search(SHARD, name)]
    if len(others) == 1:
        return others[0]
    if others:
        raise LoadError(
            f"{folder} holds several quantized models: {', '.join(others)}. Name one of them, without the ending, as "
            "model_file_base_name in quantize_config.json."
        )
    refuse_unreadable(str(folder), found)
    raise LoadError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; it holds: {', '.join(found[:10]) or 'nothing'}."
    )


def refuse_unreadable(where: str, names: Sequence[str]) -> None:
    """Say by name why a folder or repository without safetensors files cannot be loaded, if its files show it."""
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        raise LoadError(GGUF_REFUSAL.format(what=f"{where}/{gguf[0]}"))
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        raise LoadError(
            f"{where} has only pickled weights ({', '.join(pickles[:3])}), and unpickling runs code from the file. "
            "Use a safetensors copy of the model, or convert it on a machine you can afford to lose."
        )


def weight_files(folder: Path, weights: str) -> tuple[Path, ...]:
    """The safetensors files that make up the checkpoint, sorted."""
    if not weights.endswith(".json"):
        return (folder / weights,)
    index = folder / weights
    files = []
    for name in sorted(set(_weight_map(index).values())):
        path = folder / name
        if Path(name).name != name:
            raise LoadError(f"{index} names {name!r}, which is not a plain file name. Refused.")
        if not path.is_file():
            raise LoadError(f"{index} names {name}, which is missing from {folder}. Fetch the missing shard.")
        files.append(path)
    return tuple(files)


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    if "metadata" not in content:
        raise LoadError(f'{index} has no "metadata", which Transformers needs. Add "metadata": {{}} to it.')
    weights = content.get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise LoadError(
            f"{index} has no weight_map from tensor names to file names. The file is damaged; fetch it again."
        )
    return weights


def check_index(folder: Path, weights: str, tensors: Iterable[str]) -> None:
    """Every tensor that the index promises is in a shard."""
    if not weights.endswith(".json"):
        return
    absent = sorted(set(_weight_map(folder / weights)) - set(tensors))
    if absent:
        raise LoadError(
            f"{folder / weights} names {len(absent)} tensors that no shard holds, e.g. {', '.join(absent[:3])}. "
            "The checkpoint is damaged; fetch the shards again."
        )


def refuse_gguf_folder(folder: Path) -> None:
    """Raise for a folder that holds GGUF files and nothing that describes a Transformers model."""
    gguf = sorted(path.name for path in folder.glob("*") if path.suffix.lower() == ".gguf")
    if gguf and not (folder / "config.json").is_file():
        raise LoadError(GGUF_REFUSAL.format(what=folder / gguf[0]))
