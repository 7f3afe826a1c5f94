"""The dialects of module lists, on names and entries as they are published."""

from __future__ import annotations

import pytest

from quant import matching
from quant.base import BadCheckpoint
from quant.matching import Dialect

NAMES = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.gate_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.11.mlp.experts.3.gate_proj",
    "lm_head",
]


def named(dialect: Dialect, entry: str) -> list[str]:
    return [name for name in NAMES if dialect(entry, name)]


GATE, GATE_PROJ, DOWN, EXPERT, HEAD = NAMES[3], NAMES[4], NAMES[5], NAMES[6], NAMES[7]


@pytest.mark.parametrize(
    ("dialect", "entry", "expected"),
    [
        # a substring of the name within a decoder layer
        (matching.autoawq, "gate", [GATE, GATE_PROJ, EXPERT]),
        (matching.autoawq, "lm_head", []),
        (matching.autoawq, "layers", []),
        # a substring of the full name
        (matching.vllm_substring, "gate", [GATE, GATE_PROJ, EXPERT]),
        (matching.vllm_substring, "layers.1", [*NAMES[2:7]]),
        (matching.vllm_substring, "lm_head", [HEAD]),
        # the full name
        (matching.vllm_exact, "lm_head", [HEAD]),
        (matching.vllm_exact, "gate", []),
        (matching.vllm_exact, "model.layers.1.mlp.gate", [GATE]),
        # a regular expression up to a component's end, or an ending
        (matching.transformers, "model.layers.1", NAMES[2:5]),
        (matching.transformers, "model.layers.*.mlp.gate", [GATE]),
        (matching.transformers, "gate", [GATE]),
        (matching.transformers, "proj", [n for n in NAMES if n.endswith("proj")]),
        (matching.transformers, "model.layers.0.|lm_head", [NAMES[1], HEAD]),
        (matching.transformers, "*.mlp", []),
        # whole components, with or without model.
        (matching.path_components, "mlp.gate", [GATE]),
        (matching.path_components, "layers.1", NAMES[2:5]),
        (matching.path_components, "model.lm_head", [HEAD]),
        (matching.path_components, "gate", [GATE]),
        (matching.path_components, "layer", []),
        (matching.components, "mlp.gate", [GATE]),
        (matching.components, "model.layers.1.", NAMES[2:5]),
        (matching.components, "model.lm_head", []),
        # the full name, a class, or re: from the start
        (matching.compressed_tensors, "lm_head", [HEAD]),
        (matching.compressed_tensors, "gate", []),
        (matching.compressed_tensors, "Linear", NAMES),
        (matching.compressed_tensors, r"re:.*mlp\.gate$", [GATE]),
        (matching.compressed_tensors, "re:model.layers.1", NAMES[2:7]),
        (matching.compressed_tensors, "re:mlp", []),
        # shell wildcards, or whole components
        (matching.modelopt, "*.mlp.gate", [GATE]),
        (matching.modelopt, "model.layers.1*", NAMES[2:7]),
        (matching.modelopt, "lm_head", [HEAD]),
        (matching.modelopt, "*experts*", [EXPERT]),
        (matching.modelopt, "mlp.gate", [GATE]),
        # a regular expression from the start, after a sign
        (matching.gptqmodel, r"-:.*layers\.1\.mlp\.gate", [GATE, GATE_PROJ]),
        (matching.gptqmodel, r"+:.*down_proj", [DOWN]),
        (matching.gptqmodel, "lm_head", [HEAD]),
        (matching.gptqmodel, "mlp", []),
        # the full name, or a regular expression anywhere
        (matching.auto_round, "model.layers.1.mlp.gate", [GATE]),
        (matching.auto_round, "mlp.gate", []),
        (matching.auto_round, r"mlp\.gate", [GATE, GATE_PROJ]),
        (matching.auto_round, r".*mlp.*down_proj", [DOWN]),
    ],
)
def test_each_dialect(dialect: Dialect, entry: str, expected: list[str]) -> None:
    assert named(dialect, entry) == expected


def test_classes_of_compressed_tensors() -> None:
    assert matching.compressed_tensors("LlamaAttention", "model.layers.0.self_attn", ("LlamaAttention", "Module"))
    assert not matching.compressed_tensors("Linear", "model.embed_tokens", ("Embedding", "Module"))


@pytest.mark.parametrize("dialect", [matching.compressed_tensors, matching.gptqmodel, matching.auto_round])
def test_a_regular_expression_that_is_none_is_an_error(dialect: Dialect) -> None:
    with pytest.raises(BadCheckpoint, match=r"not a valid regular expression"):
        dialect("re:(" if dialect is matching.compressed_tensors else "(", "a")


def test_entries_that_name_nothing() -> None:
    entries = ["lm_head", "gate_up", "visual"]
    assert matching.unmatched(entries, NAMES, matching.vllm_substring) == ["gate_up", "visual"]
    assert matching.unmatched([], NAMES, matching.vllm_exact) == []


def test_the_first_entry_holds() -> None:
    assert matching.first(["x", "gate", "mlp"], GATE, matching.vllm_substring) == "gate"
    assert matching.first(["x"], GATE, matching.vllm_substring) is None


def test_rules_of_gptqmodel_leave_dense_first() -> None:
    rules = matching.gptqmodel_rules({"dynamic": {".*": {"bits": 8}, r"-:.*gate$": {}}})
    assert rules.find(GATE) == r"-:.*gate$"
    assert rules.settings[r"-:.*gate$"] is None
    assert rules.find(DOWN) == ".*"


def test_rules_of_auto_round_prefer_a_full_name() -> None:
    rules = matching.auto_round_rules({"extra_config": {".*mlp.*": {"bits": 8}, GATE: {"bits": 16}, DOWN: {"bits": 2}}})
    assert rules.find(GATE) == GATE
    assert rules.settings[GATE] is None
    assert rules.find(DOWN) == DOWN
    assert rules.find(EXPERT) == ".*mlp.*"


@pytest.mark.parametrize("value", [["a"], {"a": 4}, "a"])
def test_rules_that_are_no_rules(value: object) -> None:
    with pytest.raises(BadCheckpoint, match="dynamic must map module patterns to settings"):
        matching.gptqmodel_rules({"dynamic": value})
