"""The benchmark against other runtimes: what it asks of a peer, what it refuses to print, what it draws."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine, report
from benchmarks.engine_peers import PEERS, Peer

TWO = ["relinear awq", "transformers bf16"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "NEW", 32)
        return engine.run("tiny", TWO, [], 1, tmp_path_factory.mktemp("engine"))


def test_every_peer_gets_every_number(measured: dict[str, Any]) -> None:
    assert list(measured["peers"]) == TWO
    assert measured["wrong"] == {}
    for row in measured["peers"].values():
        assert set(row["rates"]) == set(engine.METRICS)
        assert row["rates"]["prefill"] > 0
        assert row["rates"][engine.END_TO_END] > 0
        assert row["load"] > 0
        assert row["peak"] > 1 << 20
    ours, theirs = (measured["peers"][name] for name in TWO)
    assert ours["step_bytes"] < theirs["step_bytes"]


def test_a_peer_with_wrong_answers_gets_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "NEW", 2)
    generate = engine.Worker.generate

    def off_by_one(worker: engine.Worker, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        seconds, rows = generate(worker, prompts, new)
        return seconds, [[token - 1 for token in row] for row in rows]

    monkeypatch.setattr(engine.Worker, "generate", off_by_one)
    result = engine.run("tiny", TWO[:1], [], 1, tmp_path)
    assert result["wrong"][TWO[0]] > engine.TIE
    assert result["peers"] == {}


def test_a_peer_that_is_not_installed_is_named_with_what_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PEERS, "other", Peer("bf16", "nowhere", "pip install it", print))
    assert engine.available(["relinear awq", "other"], []) == ["relinear awq"]
    assert "other is left out, nowhere is not installed: pip install it" in capsys.readouterr().err


@pytest.mark.parametrize("name", report.ARGUMENTS)
def test_a_benchmark_takes_what_the_report_gives_it(name: str) -> None:
    """A parser complains of all that it does not know: that has to be the last argument alone."""
    given = [
        *report.ARGUMENTS[name],
        *(["--python", "gptqmodel=python"] if name in report.WITH_PYTHONS else []),
        "--nothing",
    ]
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *given], cwd=report.ROOT, capture_output=True)
    assert done.stderr.endswith(b"error: unrecognized arguments: --nothing\n"), done.stderr


def test_the_figures_name_every_peer_and_kernel(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(report.MODELS, "tiny", "tiny model")
    drawn = report.engine_figure({"models": {"tiny": measured}})
    ElementTree.fromstring(drawn)
    assert all(name in drawn for name in TWO)
    rows = [
        {"shape": [8, 8], "kind": kind, "rows": rows, "path": path, "of_bound": 0.5}
        for kind in ("int4", "nf4")
        for rows in (1, 8)
        for path in ("bf16 F.linear", "c (C for this processor)")
    ]
    drawn = report.linear_figure({"table": rows})
    ElementTree.fromstring(drawn)
    assert all(name in drawn for name in ("relinear int4", "relinear nf4", "bf16 (torch)"))


def test_the_table_says_where_it_was_measured(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(report.MODELS, "tiny", "tiny model")
    where = {"threads": 2, "device": "Processor X", "commit": "abc", "torch": "1", "transformers": "2"}
    result = {"environment": where, "models": {"tiny": measured}}
    monkeypatch.setattr(report, "kept", lambda name: result)
    text = report.readme_with_table(report.README.read_text())
    assert "2 cores (Processor X) at commit abc" in text
    assert "| relinear awq | " in text
