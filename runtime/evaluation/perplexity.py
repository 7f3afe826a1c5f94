"""Perplexity by three recipes, whose numbers never compare: the recipe's name is part of the result.

``bits-per-byte``
    Ours, for any text. Windows behind a beginning-of-text token, every token scored once; the text's bytes do not depend on
    the tokenizer, so this number alone compares across models.
``wikitext-2048``
    Of the GPTQ and AWQ papers, for ``wiki.test.raw``: its lines joined by blank ones as the ``datasets`` library gives them,
    one token stream, chunks of 2048 without overlap, the rest dropped (``datautils.py`` and ``llama.py`` of IST-DASLab/gptq).
``llama.cpp-512``
    Of ``llama-perplexity -c 512``: the file as it is, chunks of 512, a beginning-of-text token put in place of each chunk's
    first if the tokenizer adds one, the second half of each chunk scored (``tools/perplexity/perplexity.cpp``). The program's
    own standard error takes tokens as independent; ours is clustered by chunk and larger.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from runtime.config import EngineConfig
from runtime.errors import InvalidRequest
from runtime.evaluation.compare import ROW_ELEMENTS
from runtime.evaluation.estimate import Estimate, mean, ratio
from runtime.evaluation.scorer import Scorer, as_config
from runtime.evaluation.text import Document, Text, Window, fingerprint, read_documents, windows


@dataclass(frozen=True)
class Perplexity:
    """``bits_per_byte`` is ``None`` for recipes that leave out a part of the text."""

    model: str
    recipe: str
    text: str
    tokens: int
    windows: int
    perplexity: Estimate
    bits_per_byte: Estimate | None

    def data(self) -> dict[str, Any]:
        plain = ("model", "recipe", "text", "tokens", "windows")
        return {
            **{name: getattr(self, name) for name in plain},
            "standard_errors": "clustered by window",
            "perplexity": self.perplexity.data(),
            "bits_per_byte": self.bits_per_byte.data() if self.bits_per_byte else None,
        }

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.tokens} tokens, {self.windows} windows, text {self.text[:12]}"]
        lines += [f"perplexity     {self.perplexity}  [{self.recipe}]"]
        lines += [f"bits per byte  {self.bits_per_byte}  [{self.recipe}]"] if self.bits_per_byte else []
        return "\n".join([*lines, "± is one standard error, clustered by window"])


def perplexity(
    model: str | EngineConfig,
    text: Text,
    *,
    recipe: str = "bits-per-byte",
    tokens: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of a text, of its first windows that hold ``tokens`` scored tokens or of all of it.

    Raises :class:`LoadError`, :class:`InvalidRequest`, and :class:`Error` for logits that are not finite.
    """
    if recipe not in RECIPES:
        raise InvalidRequest(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}.")
    documents = read_documents(text)
    return score(Scorer(as_config(model)), documents, recipe=recipe, tokens=tokens, progress=progress)


def score(
    scorer: Scorer, documents: list[Document], *, recipe: str, tokens: int | None = None, progress: bool = False
) -> Perplexity:
    """The same for a model that is loaded already."""
    length, cut = RECIPES[recipe]
    scorer.require_length(length)
    chosen = cut(scorer.tokenizer, documents, length, tokens)
    nll, clusters, sizes = [], [], []
    total = sum(len(one.ids) - one.scored for one in chosen)
    with tqdm(total=total, desc="tokens", unit="tok", disable=not progress, file=sys.stderr) as bar:
        for number, one in enumerate(chosen):
            losses = window_losses(scorer.logits(one.ids), one)
            nll.append(losses)
            clusters.append(torch.full((len(losses),), number))
            sizes.append(torch.full((len(losses),), one.bytes / len(losses), dtype=torch.float64))
            bar.update(len(losses))
    losses, windows_of = torch.cat(nll), torch.cat(clusters)
    loss = mean(losses, windows_of)
    whole = recipe == "bits-per-byte"
    start = "" if not whole else "/bos" if scorer.tokenizer.bos_token_id is not None else "/overlap"
    return Perplexity(
        model=scorer.label,
        recipe=f"{recipe}/window={length}{start}",
        text=fingerprint(documents),
        tokens=len(losses),
        windows=len(chosen),
        perplexity=loss.map(math.exp, math.exp(loss.value)),
        bits_per_byte=ratio(losses / math.log(2), torch.cat(sizes), windows_of) if whole else None,
    )


@torch.inference_mode()
def window_losses(logits: torch.Tensor, window: Window) -> torch.Tensor:
    """Negative log-likelihood of every scored token, in nats, from logits ``[tokens, vocabulary]``."""
    target = torch.tensor(window.ids[window.scored :])
    rows = max(1, ROW_ELEMENTS // logits.shape[-1])
    scored = logits[window.scored - 1 : len(window.ids) - 1]
    parts = [
        -part.cpu().double().log_softmax(-1).gather(1, at[:, None])[:, 0]
        for part, at in zip(scored.split(rows), target.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _wikitext(tokenizer: Any, documents: list[Document], length: int, tokens: int | None) -> list[Window]:
    lines = (line for document in documents for line in io.StringIO(document.text, newline=None))
    rows = [line if line.strip() else "" for line in lines]  # lines as a file has them: only line feeds end one
    return _chunks(list(tokenizer("\n\n".join(rows), verbose=False)["input_ids"]), length, 1, None, tokens)


def _llama_cpp(tokenizer: Any, documents: list[Document], length: int, tokens: int | None) -> list[Window]:
    ids = list(tokenizer("".join(document.text for document in documents), verbose=False)["input_ids"])
    first = tokenizer.bos_token_id if ids[:1] == [tokenizer.bos_token_id] else None
    return _chunks(ids, length, length // 2 + 1, first, tokens)


def _chunks(ids: list[int], length: int, scored: int, first: int | None, tokens: int | None) -> list[Window]:
    count = len(ids) // length
    if count < 1:
        raise InvalidRequest(f"the text has {len(ids)} tokens; this recipe needs at least one chunk of {length}.")
    if tokens is not None:
        count = min(count, -(-tokens // (length - scored)))
    chunks = [ids[k * length : (k + 1) * length] for k in range(count)]
    return [Window("", [chunk[0] if first is None else first, *chunk[1:]], scored, 0) for chunk in chunks]


Cut = Callable[[Any, list[Document], int, int | None], list[Window]]

RECIPES: dict[str, tuple[int, Cut]] = {
    "bits-per-byte": (512, windows),
    "wikitext-2048": (2048, _wikitext),
    "llama.cpp-512": (512, _llama_cpp),
}
"""Tokens of a window, and how a text becomes windows."""
