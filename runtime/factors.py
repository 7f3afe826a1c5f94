"""Rotary factors that depend on the length of a sequence: which length each token is computed for. Knows no torch.

What is computed is what Transformers computes for the sequence alone, whatever else is in the batch:

* ``longrope`` (Phi-3 and its kin) has factors for sequences up to a limit and others for longer ones. Keys of both kinds do
  not fit together. So a sequence that grows beyond the limit is computed anew, once, as Transformers' Phi-3 does while it
  generates (``prepare_inputs_for_generation``), and a prompt that is longer is computed with the long factors from its first
  token on. At any time its logits are those of a forward over all of its tokens.
* ``dynamic`` has other factors for every length beyond the limit. A prompt is computed for its own length and a token that is
  generated later for the length that it makes; what is in the cache stays, as in ``generate`` with a cache.

Cached prefixes are shared only by sequences that compute them alike.
"""

from __future__ import annotations

from typing import NamedTuple

from runtime.request import Request


class Factors(NamedTuple):
    """``kind`` is ``longrope`` or ``dynamic``; sequences of at most ``limit`` tokens need no care."""

    kind: str
    limit: int

    def of(self, request: Request) -> int:
        """Names the factors of the request's first tokens: what is cached under another name is of no use to it."""
        if self.kind == "longrope":
            return int(len(request) > self.limit)
        return self._beyond(len(request.prompt))

    def lengths(self, request: Request, start: int, stop: int) -> list[int]:
        """The length that each token from ``start`` to ``stop`` is computed for; 0: one within the limit."""
        if self.kind == "longrope":
            return [self._beyond(len(request))] * (stop - start)
        return [self._beyond(max(len(request.prompt), position + 1)) for position in range(start, stop)]

    def _beyond(self, length: int) -> int:
        return length if length > self.limit else 0
