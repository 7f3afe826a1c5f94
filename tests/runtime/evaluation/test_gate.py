"""The gate's three exit statuses, in both directions, and what its file remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.cli import main

SETTINGS = ["--dtype", "float32", "--kernel", "reference"]


def run(file: Path, *more: str) -> int:
    return main(["eval", "gate", "demo", "--baseline", str(file), *SETTINGS, *more])


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gate") / "new" / "demo.json"
    assert (
        run(file, "--reference", "demo-bf16", "--text", "demo", "--tokens", "250", "--window", "128", "--update") == 0
    )
    return file


@pytest.fixture
def copy(baseline: Path, tmp_path: Path) -> Path:
    file = tmp_path / "copy.json"
    file.write_text(baseline.read_text())
    return file


def edit(file: Path, metric: str, factor: float) -> None:
    content = json.loads(file.read_text())
    content["metrics"][metric]["value"] *= factor
    file.write_text(json.dumps(content))


def test_the_same_again_passes_and_needs_no_settings(baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(baseline) == 0
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "factor", "verdict"),
    [
        ("mean_kl", 0.97, "regression"),
        ("mean_kl", 1.03, "unexplained improvement"),
        ("top1_agreement", 1.03, "regression"),
        ("top1_agreement", 0.97, "unexplained improvement"),
    ],
)
def test_either_direction_fails(
    copy: Path, metric: str, factor: float, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy, metric, factor)
    assert run(copy) == 1
    found = capsys.readouterr().out
    assert [line.split()[0] for line in found.splitlines() if line.endswith(verdict)] == [metric]
    assert "FAILED" in found


def test_the_tolerance_can_be_set_and_is_remembered(copy: Path) -> None:
    edit(copy, "mean_kl", 1.03)
    assert run(copy, "--tolerance", "0.05") == 0
    assert run(copy, "--tolerance", "0.001", "--update") == 0
    edit(copy, "mean_kl", 1.002)
    assert run(copy) == 1


def test_another_kernel_attention_or_size_is_a_change(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(copy.read_text())
    copy.write_text(json.dumps(content | {"kernels": ["cpu", "torch"], "attention": "cpu", "bits_per_weight": 16.0}))
    assert run(copy, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [change.split()[0] for change in found["changes"]] == ["kernels", "attention", "bits"]
    assert not found["passed"]


def test_a_wrong_question_has_a_status_of_its_own(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(copy, "--tokens", "300") == 2
    assert "do not compare" in capsys.readouterr().err
    assert run(tmp_path / "absent.json") == 2
    assert "--update writes one" in capsys.readouterr().err
    assert run(tmp_path / "absent.json", "--update", "--text", "demo") == 2
    assert "does not say reference yet" in capsys.readouterr().err
    copy.write_text("{}")
    assert run(copy) == 2
    assert not list(tmp_path.glob(".*"))
