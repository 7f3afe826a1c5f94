"""What a quantized KV cache costs as the context grows: KL to a bf16 cache, by position.

    python -m benchmarks.kv_fidelity --tokens 8192

The bundled model was made for 1024 positions; dynamic rotary scaling stretches it, and its loss by position says how far that
is a language model still. The text is the standard library of the Python that runs this. Everything but keys and values
is float32. Nothing of this is timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import print_json
from runtime import EngineConfig
from runtime.checkpoint import locate
from runtime.evaluation.scorer import Scorer

MODULES = ("argparse", "typing", "inspect", "doctest", "tarfile", "subprocess")


def stretched(folder: Path, tokens: int) -> Path:
    """The bundled model in bf16, made for so many tokens."""
    shutil.copytree(locate("demo-bf16"), folder)
    config = json.loads((folder / "config.json").read_text())
    factor = tokens / config["max_position_embeddings"]
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": max(1.0, factor)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    source = "\n".join((Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text() for name in MODULES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(stretched(Path(scratch) / "model", arguments.tokens))

        def log_probabilities(kv_cache_dtype: str) -> tuple[Tensor, list[int]]:
            scorer = Scorer(EngineConfig(folder, dtype="float32", kv_cache_dtype=kv_cache_dtype))
            ids = list(scorer.tokenizer(source)["input_ids"])[: arguments.tokens]
            return scorer.logits(ids).float().log_softmax(-1), ids

        wanted, ids = log_probabilities("bf16")
        edges = [0, *(edge for edge in (1024, 2048, 4096, 8192, 16384) if edge < len(ids)), len(ids)]
        spans = list(pairwise(edges))
        loss = -wanted[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        print("positions       " + "".join(f"{f'{first}-{last}':>14}" for first, last in spans))
        print("loss (nats)     " + "".join(f"{float(loss[first:last].mean()):14.3f}" for first, last in spans))
        for kv_cache_dtype in ("int8", "fp8_e4m3"):
            found = log_probabilities(kv_cache_dtype)[0]
            divergence = (wanted.exp() * (wanted - found)).sum(-1)
            same = (wanted.argmax(-1) == found.argmax(-1)).double()
            kl = [float(divergence[first:last].mean()) for first, last in spans]
            top1 = [float(same[first:last].mean()) for first, last in spans]
            print(f"{kv_cache_dtype:9} KL     " + "".join(f"{value:14.6f}" for value in kl))
            print(f"{kv_cache_dtype:9} top-1  " + "".join(f"{100 * value:13.2f}%" for value in top1))
            print_json("kv_fidelity", kv_cache_dtype=kv_cache_dtype, spans=spans, kl=kl, top1=top1)


if __name__ == "__main__":
    main()
