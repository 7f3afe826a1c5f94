"""Writes a bf16 Llama checkpoint as GGUF and has llama.cpp quantize it, so that it can be a peer in ``benchmarks.engine``.

    python -m benchmarks.gguf_llama FOLDER FILE Q4_0

Needs ``pip install llama-cpp-python gguf`` and nothing of ours. Without a vocabulary: for token ids only.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""What llama.cpp rotates in pairs of neighbours, Transformers in halves; by which entry of the config."""


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and bf16 values as bytes, ``[..., 2 * columns]``; numpy has no bfloat16."""
    import numpy as np

    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(data[8:start].tobytes())
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
                first, last = (start + offset for offset in entry["data_offsets"])
                *rows, columns = entry["shape"]
                yield name, data[first:last].reshape(*rows, 2 * columns)


def gguf_name(name: str) -> str:
    if name in ("model.embed_tokens.weight", "model.norm.weight"):
        return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[name.split(".")[1]]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write(folder: Path, file: Path) -> None:
    import gguf
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    for name, value in tensors(folder):
        target = gguf_name(name)
        heads = ROTATED.get(target.split(".")[-2])
        if value.ndim == 1:
            wide = value.view("<u2").astype(np.uint32) << 16
            writer.add_tensor(target, wide.view(np.float32))
            continue
        if heads:
            count = config[heads]
            value = value.reshape(count, 2, head // 2, -1).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(target, value, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, file: Path, kind: str) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(parameters))
    if status:
        raise RuntimeError(f"llama.cpp could not quantize {source} to {kind}: status {status}")


def main() -> None:
    folder, file, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    plain = file.with_suffix(".bf16")
    write(folder, plain)
    quantize(plain, file, kind)
    plain.unlink()


if __name__ == "__main__":
    main()
