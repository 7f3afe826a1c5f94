"""A checkpoint on disk: its files, tensor headers and configuration. No weight is read and no code of it is run.

Everything a file says about itself is checked against the file: header lengths, offsets, sizes, shards, paths. What
passes here can be mapped into memory.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from quant.base import TensorSpec
from runtime.errors import LoadError
from runtime.files import (
    GGUF_REFUSAL,
    check_index,
    read_json,
    refuse_gguf_folder,
    refuse_unreadable,
    weight_files,
    weights_name,
)

BUNDLED = {"demo": "awq", "demo-bf16": "bf16"}
"""Names that stand for the model that ships with the package, wherever a model path is taken."""

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Checkpoint:
    """``weights`` is the name of the one file that holds the tensors, or of the index that names the ``files`` that do.
    ``tensors`` maps every stored name to its shape and dtype, ``quantization`` is the quantization configuration wherever
    it was found (``quantization_source`` says where), or ``None``."""

    name: str
    folder: Path
    weights: str
    files: tuple[Path, ...]
    config: dict[str, Any]
    quantization: dict[str, Any] | None
    quantization_source: str
    tensors: dict[str, TensorSpec]

    @classmethod
    def open(cls, name: str | Path, revision: str | None = None, *, code: bool = False) -> Checkpoint:
        """Open a folder, a Hub repository or a bundled model; ``code`` fetches Python files of a repository too.

        Raises :class:`LoadError` with the cause and the remedy.
        """
        _refuse_gguf_name(str(name))
        folder = locate(str(name), revision, code=code)
        refuse_gguf_folder(folder)
        if (folder / "adapter_config.json").is_file():
            raise LoadError(
                f"{folder} is an adapter (adapter_config.json), not a model. Merge it into its base model first."
            )
        config = read_json(folder / "config.json")
        quantization, source = _find_quantization(config, folder)
        if str((quantization or {}).get("quant_method", "")).lower() == "gguf":
            raise LoadError(GGUF_REFUSAL.format(what=f"{folder} ({source}: quant_method gguf)"))
        weights = weights_name(folder, quantization or {})
        files = weight_files(folder, weights)
        tensors: dict[str, TensorSpec] = {}
        for file in files:
            for tensor, spec in read_header(file).items():
                if tensor in tensors:
                    raise LoadError(
                        f"{file}: tensor {tensor} is stored in another shard as well. The checkpoint is damaged."
                    )
                tensors[tensor] = spec
        check_index(folder, weights, tensors)
        return cls(str(name), folder, weights, files, config, quantization, source, tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(spec) for spec in self.tensors.values())

    def remote_code(self) -> list[str]:
        """The configuration files that want to import Python code of the checkpoint (``auto_map``)."""
        names = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
        present = (name for name in names if (self.folder / name).is_file())
        return [name for name in present if _has_key(read_json(self.folder / name), "auto_map")]


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor with this header."""
    return math.prod(spec.shape) * spec.dtype.itemsize


def locate(name: str, revision: str | None = None, *, weights: bool = True, code: bool = False) -> Path:
    """The local folder of a model name; a Hub repository is downloaded: configuration and tokenizer, and what is asked."""
    if name in BUNDLED:
        return Path(str(resources.files("runtime") / "bundled" / BUNDLED[name]))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                raise LoadError(GGUF_REFUSAL.format(what=path))
        raise LoadError(f"{path} is a file; name the folder that holds config.json and the safetensors files.")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        bundled = ", ".join(BUNDLED)
        raise LoadError(
            f"{name}: no such folder, and not a Hub repository (OWNER/NAME) or a bundled model ({bundled})."
        )
    return _download(name, revision, ["*.safetensors"] * weights + ["*.py"] * code)


def _download(repository: str, revision: str | None, more: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", *more]
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
        if "*.safetensors" in more and not any(folder.glob("*.safetensors")):
            refuse_unreadable(repository, HfApi().list_repo_files(repository, revision=revision))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise LoadError(
            f"{repository}: no such folder here, and the Hub did not give it ({type(error).__name__}: {error}). "
            "Check the name and the network, or pass the path of a local folder."
        ) from error


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors of a safetensors file. Format: an eight-byte length, a JSON object, the data without gaps.

    Source: the safetensors README, "Format". Every length and offset is checked against the file before it is believed.
    """
    size = path.stat().st_size

    def damaged(what: str) -> LoadError:
        return LoadError(f"{path}: {what}. The file is damaged or truncated ({size} bytes); fetch it again.")

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise damaged(f"its header claims {length} bytes")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise damaged(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    specs: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop))
        except (TypeError, KeyError, ValueError) as error:
            raise damaged(f"the header entry of {name} is malformed") from error
        if not whole or not isinstance(dtype, str):
            raise damaged(f"the header entry of {name} is malformed")
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise LoadError(f"{path}: tensor {name} has dtype {dtype}, which is not supported; known: {known}.")
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if stop - start != expected:
            raise damaged(f"{name} is {dtype} {list(shape)}, {expected} bytes, but spans {stop - start}")
        if 8 + length + stop > size:
            raise damaged(f"{name} ends at byte {8 + length + stop}")
        specs[name] = TensorSpec(shape, DTYPES[dtype])
        spans.append((start, stop, name))
    spans.sort()
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise damaged(f"{first} and {second} overlap")
    return specs


def _find_quantization(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The quantization configuration and where it stands; nested places are those that vLLM and Transformers read."""
    text = config.get("text_config")
    places: list[tuple[str, Any]] = [
        ("config.json: quantization_config", config.get("quantization_config")),
        (
            "config.json: text_config.quantization_config",
            text.get("quantization_config") if isinstance(text, dict) else None,
        ),
        ("config.json: compression_config", config.get("compression_config")),
    ]
    for name in ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json"):
        if (folder / name).is_file():
            places.append((name, _side_file(name, read_json(folder / name))))
    for source, found in places:
        if found is None:
            continue
        if not isinstance(found, dict):
            raise LoadError(f"{source} is a {type(found).__name__}, not an object. The file is damaged.")
        return found, source
    return None, ""


def _side_file(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The content of a side file, with the method that its old writers took for granted: auto-gptq in
    ``quantize_config.json``, AutoAWQ and llm-awq in ``quant_config.json``."""
    method = found.get("quant_method") or found.get("method")
    if method is None and name == "quantize_config.json":
        awq = str(found.get("version") or "").lower().startswith(("gemm", "gemv"))
        method = "awq" if awq else "gptq"
    if method is None and name == "quant_config.json":
        method = "awq"
    return found if method is None else found | {"quant_method": method}


def _refuse_gguf_name(name: str) -> None:
    lowered = name.lower()
    if Path(name).is_dir():
        return
    if lowered.endswith(".gguf") or re.search(r":i?q\d", lowered):
        raise LoadError(GGUF_REFUSAL.format(what=name))


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_has_key(item, key) for item in value.values())
    return isinstance(value, list) and any(_has_key(item, key) for item in value)
