"""Runs the CPU's benchmarks, keeps what they found, draws it, and writes README's table of it.

    python -m benchmarks.report [linear attention engine loading serve] [--python PACKAGE=PYTHON ...] [--draw]

Each result goes to ``benchmarks/results/cpu_NAME.json``, the last line of the benchmark. ``--draw`` measures nothing and draws
again what is kept: ``cpu_engine.svg``, tokens a second against the batch, and ``cpu_linear.svg``, fractions of the bound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pythons import add_python_argument
from runtime.evaluation.chart import Axis, Panel, figure

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
BEGIN, END = "<!-- speed: written by python -m benchmarks.report -->", "<!-- /speed -->"

ARGUMENTS: dict[str, list[str]] = {
    "linear": ["--kinds", "awq", "int8", "w4a8", "nf4", "mxfp4", "fp8"],
    "attention": ["--device", "cpu"],
    "engine": [],
    "loading": [],
    "serve": [],
}
WITH_PYTHONS = ("engine", "loading")
"""Those whose peers may live in other environments."""
MODELS = {"1b": "Llama of 1.2 B parameters", "135m": "Llama of 135 M parameters", "demo": "bundled model"}
BASELINE = "transformers bf16"
SHOWN = {
    "prefill": "prompt of 512",
    "decode 1": "1 sequence",
    "decode 8": "8 sequences",
    "8 requests": "8 requests whole",
}
BATCHES = (1, 2, 4, 8)
COLOURS = {"relinear": 0, "transformers": 1, "llama.cpp": 2, "vllm": 3, "torch": 4}
HEIGHT = 300
ROOM = 3.0
"""Times the largest place on an axis: where it ends, so that names stand beside the last points."""


def run(name: str, extra: Sequence[str]) -> bool:
    """Run one benchmark, show what it prints and keep its last line; ``False`` and nothing kept if it failed."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *ARGUMENTS[name], *extra]
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                last = line
            else:
                print(line, end="", flush=True)
    if process.returncode or not last:
        print(f"{name} failed with status {process.returncode}; its last result is kept", file=sys.stderr)
        return False
    file_of(name).write_text(json.dumps(json.loads(last), indent=1) + "\n", encoding="utf-8")
    return True


def file_of(name: str) -> Path:
    return RESULTS / f"cpu_{name}.json"


def kept(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(file_of(name).read_text(encoding="utf-8"))
    return result


def engine_figure(result: Mapping[str, Any]) -> str:
    """Tokens a second of every peer against the batch, a panel a model."""
    panels = []
    for place, (model, found) in enumerate(in_order(result)):
        curves = {
            name: [(batch, peer["rates"][f"decode {batch}"]) for batch in BATCHES]
            for name, peer in found["peers"].items()
        }
        title = f"Decoding: {MODELS[model]}"
        panels.append(curves_panel(title, curves, "sequences at a time", "tokens a second", place, log=True))
    return figure(panels, "Tokens a second against the number of sequences, of every peer")


def linear_figure(result: Mapping[str, Any]) -> str:
    """Fractions of the bound of every kernel against the rows, a panel a shape of the weight."""
    panels = []
    table = result["table"]
    for place, shape in enumerate(sorted({tuple(row["shape"]) for row in table})):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in table:
            if tuple(row["shape"]) == shape:
                point = row["rows"], 100 * row["of_bound"]
                points = curves.setdefault(kernel_name(row), [])
                if point[0] not in dict(points):  # bfloat16 is measured beside every kind
                    points.append(point)
        title = f"Linear layer, {shape[0]} x {shape[1]}"
        panels.append(curves_panel(title, curves, "rows", "% of the bound", place))
    return figure(panels, "Fraction of the bound that every kernel reaches, against the number of rows")


def kernel_name(row: Mapping[str, Any]) -> str:
    path = str(row["path"])
    return f"relinear {row['kind']}" if "(" in path else path.replace("F.linear", "(torch)")


def curves_panel(
    title: str, curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, place: int, log: bool = False
) -> Panel:
    """Curves with their names beside them, which share a colour with their family."""
    x_axis = Axis.marked([x for points in curves.values() for x, _ in points], across, ROOM)
    y_axis = Axis.around([y for points in curves.values() for _, y in points], up, log=log, zero=not log)
    panel = Panel(title, x_axis, y_axis, top=place * HEIGHT, height=HEIGHT)
    for name, points in curves.items():
        panel.curve(points, COLOURS.get(name.partition(" ")[0], 4), name)
    panel.labels([(*max(points), name) for name, points in curves.items()])
    return panel


def in_order(result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(model, result["models"][model]) for model in MODELS if model in result["models"]]


def table(result: Mapping[str, Any]) -> str:
    """README's: tokens a second, times the baseline, of the bound."""
    where = result["environment"]
    lines = [
        f"Measured on {where['threads']} cores ({where['device']}) at commit {where['commit']}, torch {where['torch']}, "
        f"Transformers {where['transformers']}: tokens a second, times {BASELINE}, of the bound.",
    ]
    for model, found in in_order(result):
        read, multiply = found["bandwidth"] / 1e9, 2 * found["multiply_adds"] / 1e12
        lines += [
            "",
            f"| {MODELS[model]}; {read:.0f} GB/s, {multiply:.2f} TFLOP/s | {' | '.join(SHOWN.values())} | load | most memory |",
            "|---" * (len(SHOWN) + 3) + "|",
        ]
        baseline = found["peers"].get(BASELINE)
        for name, peer in found["peers"].items():
            cells = []
            for metric in SHOWN:
                rate, bound = peer["rates"][metric], peer["bounds"].get(metric)
                cell = f"{rate:.3g}" if rate < 1000 else f"{rate:.0f}"
                cell += f", {rate / baseline['rates'][metric]:.2f}x" if baseline else ""
                cells.append(cell + (f", {rate / bound:.0%}" if bound else ""))
            cells += [f"{peer['load']:.1f} s", f"{peer['peak'] / 2**30:.1f} GiB"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def readme_with_table(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(kept('engine'))}\n{END}{rest.split(END)[1]}"


def draw() -> None:
    for name, drawn in (("engine", engine_figure), ("linear", linear_figure)):
        if file_of(name).exists():
            file_of(name).with_suffix(".svg").write_text(drawn(kept(name)), encoding="utf-8")
    if file_of("engine").exists():
        README.write_text(readme_with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *ARGUMENTS], metavar="NAME", help="default: all")
    add_python_argument(parser)
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what is kept")
    arguments = parser.parse_args()
    wanted = [] if arguments.draw else arguments.names or list(ARGUMENTS)
    pythons = ["--python", *arguments.python] if arguments.python else []
    done = [run(name, pythons if name in WITH_PYTHONS else []) for name in wanted]
    draw()
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
