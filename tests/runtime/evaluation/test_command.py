"""``relinear eval`` on the command line: tables for people, JSON for programs, one sentence for what is wrong."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from runtime import EngineConfig, Error
from runtime.cli import main

SMALL = ["--text", "demo", "--tokens", "250", "--window", "128", "--dtype", "float32"]


def test_diff_of_two_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "out.svg"
    assert main(["eval", "diff", "demo-bf16", "demo", *SMALL, "--plot", str(figure)]) == 0
    shown = capsys.readouterr().out
    for line in (
        "mean KL [nat]",
        "99.9 % KL",
        "top-1 agreement",
        "worst layer",
        "kl/window=128/bos",
        "clustered by window",
    ):
        assert line in shown
    ElementTree.parse(figure)


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        (["--kv-cache-dtype", "int8"], 1e-5, 1e-3),
        (["--kernel", "cpu"], -1e-12, 1e-9),
        (["--attention-backend", "cpu"], -1e-12, 1e-9),
    ],
    ids=["cache", "kernel", "attention"],
)
def test_diff_of_one_checkpoint_with_itself_otherwise(
    options: list[str], low: float, high: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "diff", "demo", *SMALL, *options, "--no-layers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert low < found["mean_kl"]["value"] < high
    assert options[1] in found["candidate"]
    assert options[1] not in found["reference"]


def test_perplexity(capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", "demo", "--tokens", "500", "--dtype", "float32"]
    assert main(["eval", "ppl", "demo", *text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "bits-per-byte/window=512/bos"


@pytest.mark.parametrize("where", ["absent/out.svg", "."])
def test_a_figure_that_cannot_be_written_is_refused_before_anything_is_measured(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runtime.evaluation.compare.compare", None)
    assert main(["eval", "diff", "demo-bf16", "demo", *SMALL, "--plot", str(tmp_path / where)]) == 1
    assert "--plot" in (found := capsys.readouterr().err)
    assert "cannot be written" in found


@pytest.mark.parametrize(
    ("arguments", "revisions"),
    [
        (["some/model", "--revision", "new", "--reference-revision", "old"], ("old", "new")),
        (["some/model", "--revision", "new", "--kernel", "reference"], ("new", "new")),
        (["some/model", "other/model", "--revision", "gptq"], (None, "gptq")),
    ],
)
def test_a_revision_is_of_the_candidate(
    arguments: list[str], revisions: tuple[str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[EngineConfig] = []

    def compare(*sides: EngineConfig, **_: Any) -> None:
        seen.extend(sides[:2])
        raise Error("far enough")

    monkeypatch.setattr("runtime.evaluation.compare.compare", compare)
    assert main(["eval", "diff", *arguments, "--text", "demo"]) == 1
    assert tuple(side.revision for side in seen) == revisions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diff", "demo", *SMALL], "nothing differs between the sides"),
        (["diff", "demo-bf16", "demo", "--text", "/absent.txt"], "No such file"),
        (["diff", "demo-bf16", "demo", *SMALL, "--tokens", "0"], "at least one token"),
        (["diff", "demo-bf16", "demo", *SMALL, "--window", "1"], "at least 2 tokens"),
        (["ppl", "demo", "--text", "demo", "--recipe", "wikitext-2048"], "another --recipe"),
        (["tasks", "demo", "--limit", "0"], "at least one question"),
        (["tasks", "demo", "--include-path", "/absent"], "no such folder"),
        (["diff", "demo", *SMALL, "--kv-cache-dtype", "int3"], "unknown KV cache dtype 'int3'"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *arguments]) == 1
    assert message in capsys.readouterr().err
