"""How long ``relinear eval diff`` takes on the shape of a 1B model. The weights are random: its KL means nothing.

python -m benchmarks.evaluation --tokens 20000
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks import random_llama
from benchmarks.timing import print_json
from runtime import EngineConfig
from runtime.checkpoint import locate
from runtime.evaluation.compare import compare_scorers
from runtime.evaluation.scorer import Scorer
from runtime.evaluation.text import read_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sides = []
        for kind in ("bf16", "awq"):
            folder = random_llama.write(random_llama.LLAMA_1B, Path(scratch) / kind, quantized=kind == "awq")
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(locate("demo") / file, folder)
            sides.append(Scorer(EngineConfig(str(folder))))
        started = time.perf_counter()
        found = compare_scorers(*sides, read_documents("demo"), tokens=arguments.tokens, progress=True)
        seconds = time.perf_counter() - started
    print(f"{found.tokens} tokens in {seconds:.0f} s, {found.tokens / seconds:.1f} tokens/s")
    print_json("evaluation", tokens=found.tokens, seconds=seconds, windows=found.windows)


if __name__ == "__main__":
    main()
