"""`relinear verify` runs recurrent layers as the engine does, through states of their own."""

from __future__ import annotations

from pathlib import Path

from runtime import verify_model
from runtime.checkpoint import Checkpoint
from runtime.plan import make_plan
from runtime.weights import StoredWeights
from tests.architectures.sweep import PROMPTS, eager_model


def test_a_hybrid_is_served_by_pages_and_states_and_is_exact(tmp_path: Path) -> None:
    eager_model("qwen3_next").save_pretrained(tmp_path)
    plan = make_plan(Checkpoint.open(tmp_path), dtype="float32", device="cpu")
    found = verify_model.compare(StoredWeights.of(plan), PROMPTS[0])
    assert "paged" in found.attention
    assert found.passed
