"""Each recipe against a few lines that say the same another way."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from runtime import EngineConfig, InvalidRequest, perplexity
from runtime.evaluation import perplexity as module
from runtime.evaluation.perplexity import score
from runtime.evaluation.scorer import Scorer
from runtime.evaluation.text import Document, read_documents

TEXT = read_documents("demo")[0].text[:6000]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(EngineConfig("demo-bf16", dtype="float32"))


def nll(scorer: Scorer, ids: list[int], first: int) -> torch.Tensor:
    """Losses of ``ids[first:]``."""
    logits = scorer.model(torch.tensor([ids])).logits[0, first - 1 : -1]
    return F.cross_entropy(logits.double(), torch.tensor(ids[first:]), reduction="none").detach()


def test_bits_per_byte(scorer: Scorer) -> None:
    ids = scorer.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    parts = [nll(scorer, [0, *ids[start : start + 511]], 1) for start in range(0, len(ids), 511)]
    found = score(scorer, [Document("", TEXT)], recipe="bits-per-byte")
    assert found.bits_per_byte is not None
    assert found.bits_per_byte.value == pytest.approx(
        sum(p.sum().item() for p in parts) / math.log(2) / len(TEXT.encode())
    )
    assert found.perplexity.value == pytest.approx(torch.cat(parts).mean().exp().item())
    assert found.recipe == "bits-per-byte/window=512/bos"
    assert str(found).count(found.recipe) == 2


@pytest.mark.parametrize("adds", [True, False], ids=["bos", "no bos"])
def test_llama_cpp(scorer: Scorer, adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of every chunk, whose first token is replaced if the tokenizer begins texts with one of its own."""
    if not adds:
        monkeypatch.setattr(scorer, "tokenizer", partial(scorer.tokenizer, add_special_tokens=False))
        monkeypatch.setattr(scorer.tokenizer, "bos_token_id", 0, raising=False)
    ids = scorer.tokenizer(TEXT)["input_ids"]
    assert (ids[0] == 0) == adds
    chunks = [ids[start : start + 512] for start in range(0, len(ids) - 511, 512)]
    losses = torch.cat([nll(scorer, [0, *chunk[1:]] if adds else chunk, 257) for chunk in chunks])
    found = score(scorer, [Document("", TEXT)], recipe="llama.cpp-512")
    assert found.perplexity.value == pytest.approx(losses.mean().exp().item())
    assert found.tokens == 255 * len(chunks)
    assert found.bits_per_byte is None


def test_wikitext(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With shorter chunks, for this model; lines keep their ends, which only line feeds are, and blank ones are empty, as in
    the data set."""
    monkeypatch.setitem(module.RECIPES, "wikitext-2048", (256, module.RECIPES["wikitext-2048"][1]))
    text = " \r\n = Title\u2028 = \n \n" + TEXT
    rows = ["", " = Title\u2028 = \n", "", *[line + "\n" if line.strip() else "" for line in TEXT.split("\n")[:-1]]]
    rows += [TEXT.split("\n")[-1]]
    ids = scorer.tokenizer("\n\n".join(rows))["input_ids"]
    chunks = [ids[start : start + 256] for start in range(0, len(ids) - 255, 256)]
    losses = torch.stack([nll(scorer, chunk, 1) for chunk in chunks])
    found = score(scorer, [Document("", text)], recipe="wikitext-2048")
    assert found.perplexity.value == pytest.approx(losses.mean(1).mean().exp().item())


def test_what_cannot_be_measured_is_refused(scorer: Scorer) -> None:
    with pytest.raises(InvalidRequest, match="2048 tokens, and the model was made for 1024"):
        score(scorer, [Document("", TEXT)], recipe="wikitext-2048")
    with pytest.raises(InvalidRequest, match="at least one chunk of 512"):
        score(scorer, [Document("", "import os")], recipe="llama.cpp-512")
    with pytest.raises(InvalidRequest, match="known: bits-per-byte"):
        perplexity("demo", "demo", recipe="gptq")
