"""The gate's three exit statuses, in both directions, and what its file remembers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime import EngineConfig, Error
from runtime.cli import main
from runtime.evaluation import gate as module

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
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not a baseline of version 1"),
        ("no JSON", "Remove it, and --update writes one"),
        ('{"version": 1, "metrics": {}}', "it is damaged"),
        ('{"version": 1, "metrics": []}', "it is damaged"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--update", "--reference", "demo-bf16", "--text", "demo")], ids=["", "update"])
def test_a_file_that_is_no_baseline_is_refused_and_kept(
    copy: Path, content: str, message: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    copy.write_text(content)
    assert run(copy, *more) == 2
    found = capsys.readouterr().err
    assert message in found
    assert "Remove it" in found
    assert copy.read_text() == content


@pytest.mark.parametrize("part", ["settings", "tolerance", "kernels", "bits_per_weight", "metrics"])
def test_a_baseline_with_a_part_missing_is_damaged(copy: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(copy.read_text())
    del content[part]
    copy.write_text(json.dumps(content))
    assert run(copy) == 2
    assert "it is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("tolerance", ["-0.01", "nan", "inf"])
def test_a_tolerance_that_means_nothing_is_refused(
    baseline: Path, tolerance: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(baseline, f"--tolerance={tolerance}") == 2
    assert "--tolerance" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "compare", None)
    (tmp_path / "file").write_text("")
    absent = tmp_path / "file" / "below" / "a.json"
    assert run(absent, "--update", "--reference", "demo-bf16", "--text", "demo") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_references_revision_is_remembered_and_is_not_the_candidates(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[EngineConfig] = []

    def compare(reference: EngineConfig, *_: Any, **__: Any) -> None:
        seen.append(reference)
        raise Error("far enough")

    monkeypatch.setattr(module, "compare", compare)
    content = json.loads(copy.read_text())
    content["settings"]["reference_revision"] = "v1"
    copy.write_text(json.dumps(content))
    assert run(copy, "--revision", "gptq") == 2
    assert run(copy, "--revision", "gptq", "--reference", "demo-bf16", "--update") == 2
    assert run(copy, "--reference", "demo-bf16", "--reference-revision", "v2", "--update") == 2
    assert [(one.model, one.revision) for one in seen] == [
        ("demo-bf16", "v1"),
        ("demo-bf16", None),
        ("demo-bf16", "v2"),
    ]
