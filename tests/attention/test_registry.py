"""Choosing a backend: preference, refusals kept, and no silent replacement."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention import AttentionBackend, AttentionError, AttentionSpec, UnsupportedAttention, registry, select
from attention.cpu import Build
from attention.reference import ReferenceBackend

CPU = torch.device("cpu")
SPEC = AttentionSpec(4, 2, 8, 8, scale=1.0)


class Picky(ReferenceBackend):
    """Refuses softcaps."""

    name = "picky"

    def refuses(self, spec: AttentionSpec, device: torch.device) -> str | None:
        return f"no softcap on {device}" if spec.softcap is not None else None


@pytest.fixture
def picky_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(build: Build | None) -> AttentionBackend:
        return Picky()

    monkeypatch.setattr(registry, "BACKENDS", {"picky": picky, **registry.BACKENDS})


def test_the_reference_computes_everything() -> None:
    everything = AttentionSpec(6, 2, 12, 5, scale=0.7, window=6, softcap=0.8, sinks=True)
    selection = select([SPEC, everything], CPU)
    assert selection.backend.name == "reference"
    assert list(selection.refusals) == ["paged", "cpu"]
    assert selection.refusals["paged"] == f"its kernels need a CUDA device, not cpu (asked for {SPEC})"


@pytest.mark.usefixtures("picky_first")
def test_the_preferred_backend_is_taken_if_it_refuses_nothing() -> None:
    assert select([SPEC, SPEC], CPU).backend.name == "picky"


@pytest.mark.usefixtures("picky_first")
def test_one_refused_spec_is_enough_and_the_reason_is_kept() -> None:
    capped = replace(SPEC, softcap=2.0)
    selection = select([SPEC, capped, SPEC], CPU)
    assert selection.backend.name == "reference"
    assert selection.refusals["picky"] == f"no softcap on cpu (asked for {capped})"


@pytest.mark.usefixtures("picky_first")
def test_a_backend_asked_for_by_name_is_never_replaced() -> None:
    assert select([SPEC], CPU, "reference").backend.name == "reference"
    with pytest.raises(UnsupportedAttention, match="picky: no softcap on cpu"):
        select([replace(SPEC, softcap=2.0)], CPU, "picky")


@pytest.mark.usefixtures("picky_first")
def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(AttentionError, match=r"unknown attention backend 'flash'; known: picky, .*reference"):
        select([SPEC], CPU, "flash")


def test_a_name_of_hf_loads_transformers_and_other_names_do_not() -> None:
    code = "import attention, sys; attention.KVCache; assert 'transformers' not in sys.modules; attention.read_specs"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", f"{code}; assert 'transformers' in sys.modules"], check=True, cwd=root)
