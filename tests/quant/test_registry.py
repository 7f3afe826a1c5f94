"""Which format a configuration names, and what is said of the formats that are not supported."""

from __future__ import annotations

import pytest

from quant import refused, registry
from quant.base import UnsupportedCheckpoint


@pytest.mark.parametrize("name", refused.REFUSED)
def test_a_format_that_is_not_supported_is_refused_with_the_way_out(name: str) -> None:
    for spelling in (name, name.upper(), name.replace("_", "-")):
        with pytest.raises(
            UnsupportedCheckpoint, match=f"(?i){spelling}.* is not supported: .*(Use|Write) .*Known formats"
        ):
            registry.resolve({"quant_method": spelling}, {})


def test_no_known_format_is_refused() -> None:
    assert not set(registry.known_methods()) & refused.REFUSED.keys()
    assert set(refused.SPELLINGS.values()) <= refused.REFUSED.keys()


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(
        UnsupportedCheckpoint,
        match=r"'new' is not supported; known: auto-round, awq, bitsandbytes, compressed-tensors, fp8, gptq, modelopt, mxfp4\.",
    ):
        registry.resolve({"quant_method": "new"}, {})


def test_a_configuration_without_a_method() -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"has no quant_method\. Add the format.* gptq"):
        registry.resolve({"bits": 4}, {})
    assert registry.resolve({"method": "gptq", "bits": 4, "sym": True}, {}).name == "gptq"  # GPTQModel's own spelling


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("gptq", "gptq"),
        ("gptq", "gptq_marlin"),
        ("marlin", "gptq"),
        ("awq", "awq_marlin"),
        ("auto-round", "auto_round"),
    ],
)
def test_spellings_of_other_runtimes_confirm(stored: str, asked: str) -> None:
    registry.resolve({"quant_method": stored, "bits": 4, "sym": True}, {}, asked)
