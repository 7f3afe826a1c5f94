"""Time and memory of loading a Llama of 1B parameters, against Transformers, in one run.

    python -m benchmarks.loading [--shape 1b|tiny] [--rounds 3] [--python gptqmodel=PYTHON]

Two checkpoints of random weights: AWQ (peer: Transformers with GPTQModel), and bf16 that is quantized to NF4 while it loads
(peer: Transformers with bitsandbytes). Every load has a process of its own, and the peers take turns. Measured are the seconds
of the load alone, without imports, and those until the first answer, to a prompt of 32 tokens: GPTQModel maps the files while
it "loads" and unpacks every weight in the first forward pass. Memory counts until that answer too: the most that the process
ever had (which includes pages of the mapped files), and the most of its own. A peer that is not installed is named with the
line that installs it. Beside them stands the bound: the seconds in which this run copied as many bytes as are stored out of
the page cache, which a round of reading fills first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import random_llama
from benchmarks.pythons import add_python_argument, has_package, python_of
from benchmarks.timing import print_json
from runtime.peak import measure_peak, peak_rss


def relinear(path: str) -> Callable[[], nn.Module]:
    from runtime import load_model

    return lambda: load_model(path, device="cpu")


def relinear_nf4(path: str) -> Callable[[], nn.Module]:
    from runtime import load_model

    return lambda: load_model(path, device="cpu", quantization="bitsandbytes")


def transformers(path: str) -> Callable[[], nn.Module]:
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu")


def transformers_nf4(path: str) -> Callable[[], nn.Module]:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return lambda: AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map="cpu", quantization_config=config
    )


LOADERS = {loader.__name__: loader for loader in (relinear, relinear_nf4, transformers, transformers_nf4)}

PROMPT_TOKENS = 32

IMPORTED = ("transformers.models.llama.modeling_llama", "quant.kernels.cpu")
"""Imported before the clock starts."""

CASES = {"awq": (relinear, transformers, "gptqmodel"), "nf4": (relinear_nf4, transformers_nf4, "bitsandbytes")}
"""Checkpoint -> ours, the peer, and the package that the peer needs."""


def child(loader: str, path: str) -> None:
    """One load, in this process; its measurements on the last line."""
    load = LOADERS[loader](path)
    for module in IMPORTED + ("bitsandbytes",) * loader.endswith("nf4"):
        import_module(module)
    prompt = torch.arange(1, PROMPT_TOKENS + 1)[None]
    with measure_peak(torch.device("cpu")) as peak, torch.inference_mode():
        start = time.perf_counter()
        model = load()
        loaded = time.perf_counter()
        logits = model(prompt).logits
        answered = time.perf_counter()
    assert logits.isfinite().all()
    measured = {"load_seconds": loaded - start, "seconds": answered - start}
    print(json.dumps(measured | {"peak_rss": peak_rss(), "growth": peak.growth}))


def one_load(loader: str, path: Path, python: str) -> dict[str, Any] | str:
    """The measurements, or the last line of what went wrong."""
    command = [python, "-m", "benchmarks.loading", "--child", loader, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
    return json.loads(lines[-1]) if done.returncode == 0 else lines[-1]


def read_all(path: Path) -> float:
    """Seconds to read every file of a checkpoint."""
    start = time.perf_counter()
    for file in path.glob("*.safetensors"):
        file.read_bytes()
    return time.perf_counter() - start


def run_case(name: str, path: Path, rounds: int, python: str) -> dict[str, Any]:
    """``python`` has the package that the peer needs, if any has."""
    ours, peer, package = CASES[name]
    loaders = {"relinear": (ours.__name__, sys.executable)}
    result: dict[str, Any] = {}
    if has_package(python, package):
        loaders["transformers"] = (peer.__name__, python)
    else:
        print(f"{name}: Transformers needs {package} for it, which is not installed: pip install {package}")
    read_all(path)
    result["bound_seconds"] = read_all(path)
    samples: dict[str, list[dict[str, Any]]] = {who: [] for who in loaders}
    for _ in range(rounds):
        for who, (loader, its_python) in loaders.items():
            measured = one_load(loader, path, its_python)
            if isinstance(measured, str):
                print(f"{name}: {who} failed: {measured}")
            else:
                samples[who].append(measured)
    for who, found in samples.items():
        if found:
            result[who] = {key: statistics.median(sample[key] or 0 for sample in found) for key in found[0]}
            row = result[who]
            print(
                f"{name:5} {who:13} loads in {row['load_seconds']:6.2f} s, answers after {row['seconds']:6.2f} s   "
                f"peak {row['peak_rss'] / 2**20:6.0f} MiB resident, {row['growth'] / 2**20:6.0f} MiB its own"
            )
    if "relinear" in result and "transformers" in result:
        ratio = {key: result["transformers"][key] / max(result["relinear"][key], 1e-9) for key in result["relinear"]}
        result["ratio"] = ratio
        times, memory = ratio["seconds"], ratio["growth"]
        print(f"{name:5} to the answer, Transformers takes {times:.2f} x the time, {memory:.2f} x the memory")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=random_llama.SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    add_python_argument(parser)
    parser.add_argument("--child", nargs=2, metavar=("LOADER", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    results = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = random_llama.write(
                random_llama.SHAPES[arguments.shape], Path(folder) / name, quantized=name == "awq"
            )
            results[name] = run_case(name, path, arguments.rounds, python_of(CASES[name][2], arguments.python))
    print_json("loading", shape=arguments.shape, rounds=arguments.rounds, results=results)


if __name__ == "__main__":
    main()
