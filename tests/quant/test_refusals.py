"""What README says is refused is refused, and by a message that names it."""

from __future__ import annotations

import pytest

from quant.base import UnsupportedCheckpoint
from tests.refusals import REFUSALS, Refusal


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: f"{refusal.family} {refusal.what}")
def test_it_is_refused_by_name(refusal: Refusal) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=refusal.message):
        refusal.provoke()
