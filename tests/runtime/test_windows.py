"""Layers with a window give back the blocks behind it, and nothing else changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attention.base import Reach
from runtime import LLM, SamplingParams
from runtime.blocks import GONE, BlockPool
from runtime.engine import Engine
from runtime.request import Request
from runtime.scheduler import Scheduler
from tests.architectures.tiny import tiny_config
from tests.greedy import greedy_alone
from tests.runtime.test_scheduler import finished, make_request, run_step
from tests.tiny_models import VOCABULARY, randomize, tiny_model

REACHES = (Reach(), Reach(window=6), Reach(chunk=5))
SIZE = 4


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("budget", "blocks"), [(64, 400), (7, 400), (7, 30), (16, 34)])
def test_every_token_finds_what_it_sees_and_nothing_more_is_held(seed: int, budget: int, blocks: int) -> None:
    """The first is :func:`run_step`'s to say."""
    chance = random.Random(seed)
    pool = BlockPool(blocks, SIZE, reaches=REACHES, longest_chunk=budget)
    scheduler = Scheduler(pool, budget, max_running=6)
    arriving = [make_request(uid, chance.randint(1, 30), chance.randint(1, 20)) for uid in range(25)]
    for request in arriving[::3]:
        request.prompt[:] = [token + 100 for token in request.prompt]
    ended: dict[Request, Any] = {}
    count, together = len(arriving), 0
    while arriving or scheduler.has_work:
        if arriving and (not scheduler.has_work or chance.random() < 0.4):
            scheduler.add(arriving.pop())
        ended |= run_step(scheduler)
        if scheduler.running and chance.random() < 0.02:
            scheduler.remove(scheduler.running[-1])
            count -= 1
        together = max(together, len(scheduler.running))
        for request in scheduler.running:
            held = [block for table in request.blocks for block in table if block != GONE]
            assert len(held) <= pool.most_blocks(len(request))
    assert len(ended) == count
    assert together > 1
    assert pool.free == blocks
    assert not (scheduler.preemptions and blocks == 400)


def test_a_prefix_is_found_if_the_window_before_its_end_is_there() -> None:
    pool = BlockPool(40, SIZE, reaches=(Reach(), Reach(window=6)))
    request = make_request(0, 24, 1)
    pool.adopt(request, pool.match(request))
    assert pool.grow(request, 24)
    pool.register(request, 24)
    tables = [list(table) for table in request.blocks]
    pool.release(request)
    long = make_request(1, 30, 1)
    found = pool.match(long)
    assert len(found.chain) == 6
    assert found.tables == [tables[0], [GONE] * 4 + tables[1][4:]], "23 is seen from 19 on: by 24, blocks 4 and 5"
    pool.forget(tables[1][:4])
    assert pool.match(long) == found
    pool.forget([tables[1][4]])
    assert len(pool.match(long).chain) == 0, "24 sees from 19 on; no other block of this group is left before it"
    pool.check(())


def test_a_prefix_ends_where_the_window_is_whole() -> None:
    pool = BlockPool(40, SIZE, reaches=(Reach(), Reach(window=6)))
    finished(pool, make_request(0, 24, 1))
    tables = pool.match(make_request(1, 30, 1)).tables
    pool.forget([tables[1][5]])
    assert len(pool.match(make_request(2, 30, 1)).chain) == 5
    pool.forget([tables[0][2]])
    assert len(pool.match(make_request(3, 30, 1)).chain) == 2


def test_nobody_starts_from_what_a_failed_request_gave_back() -> None:
    pool = BlockPool(40, SIZE, reaches=(Reach(window=6),))
    request = make_request(0, 24, 1)
    pool.adopt(request, pool.match(request))
    for stop in (12, 24):
        pool.give_back(request)
        assert pool.grow(request, stop)
        pool.register(request, stop)
        request.computed = stop
    pool.give_back(request)
    assert request.blocks[0][:4] == [GONE] * 4
    assert len(pool.match(make_request(1, 24, 1)).chain) == 5
    pool.forget_tokens(request)
    assert not pool.match(make_request(1, 24, 1)).chain


LAYERS = ["full_attention", *["sliding_attention"] * 3]
WINDOW = 4
UNLIKE: dict[str, Any] = {"layer_types": LAYERS[::-1], "num_kv_shared_layers": 0, "global_head_dim": 16}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[(7 * place + 3 * i * i) % VOCABULARY for i in range(size)] for place, size in enumerate((40, 17, 3, 29, 1))]


def answered(tmp_path_factory: pytest.TempPathFactory, kind: str = "gemma3") -> tuple[str, list[list[int]]]:
    """A model with three windows of 4 tokens for a layer that sees everything, and its answers to each prompt alone. In
    the Gemma 4 that layer is the last, and its keys are wider."""
    if kind == "gemma4":
        tiny = tiny_config("gemma4_text").to_dict() | UNLIKE
        del tiny["per_layer_config"]  # which follows from these
        config = AutoConfig.for_model(**tiny)
        model = randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()
    else:
        model = tiny_model(kind, num_hidden_layers=4, layer_types=LAYERS)
    folder = tmp_path_factory.mktemp(kind)
    model.save_pretrained(folder)
    return str(folder), [greedy_alone(model, prompt, GREEDY.max_tokens or 0) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    return answered(tmp_path_factory)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    return answered(tmp_path_factory, "gemma4")


def load(folder: str, **options: Any) -> LLM:
    return LLM(folder, dtype="float32", skip_tokenizer_init=True, **{"block_size": 4} | options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 9}, {"max_total_tokens": 32, "max_num_batched_tokens": 9}, {"block_size": 3}],
    ids=["whole", "chunked", "preempted", "odd blocks"],
)
def test_answers_are_those_of_each_alone_over_blocks_full_of_nan(
    checkpoint: tuple[str, list[list[int]]], options: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block that is given back holds NaN at once; a second round starts from what is still cached."""
    folder, answers = checkpoint
    llm = load(folder, attention_backend=backend, **options)
    poison_blocks_of_nobody(llm, monkeypatch)
    for _ in range(2):
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)] == answers
    stats = llm.engine.stats()
    assert stats.free_blocks == stats.blocks
    assert (stats.preemptions > 0) == ("max_total_tokens" in options)
    assert stats.prefix_hits > 0 or stats.preemptions
    assert "3 of 4 groups of layers free the blocks behind their window" in llm.report


@pytest.mark.parametrize(
    ("backend", "options"),
    [("cpu", {"max_num_batched_tokens": 9}), ("reference", {"max_total_tokens": 40, "max_num_batched_tokens": 9})],
    ids=["chunked", "preempted"],
)
def test_so_are_those_where_layers_are_of_unlike_shape(
    unlike: tuple[str, list[list[int]]], options: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, answers = unlike
    llm = load(folder, attention_backend=backend, **options)
    poison_blocks_of_nobody(llm, monkeypatch)
    for _ in range(2):
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)] == answers
    assert llm.engine.runner.cache.layout.pages == (1, 2, 2)
    assert (llm.engine.stats().preemptions > 0) == ("max_total_tokens" in options)
    assert "2 of 3 groups of layers free the blocks behind their window" in llm.report


def poison_blocks_of_nobody(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on whatever no sequence holds, and nobody would find, is NaN before each step."""
    cache, pool = llm.engine.runner.cache, llm.engine.scheduler.pool
    schedule = Scheduler.schedule

    def poisoned(self: Scheduler) -> Any:
        plan = schedule(self)
        nobodys = [block for block in pool._free if block not in pool._held]
        for tensor in {tensor.untyped_storage().data_ptr(): tensor for tensor in (*cache.k, *cache.v)}.values():
            memory = tensor.new_empty(0).set_(tensor.untyped_storage())
            memory.view(cache.blocks, -1)[nobodys] = torch.nan
        return plan

    monkeypatch.setattr(Scheduler, "schedule", poisoned)


def test_the_same_memory_holds_longer_and_more_sequences(
    checkpoint: tuple[str, list[list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Memory for 32 tokens in all 4 layers is 32 blocks of 4 tokens of one layer. A sequence of 80 tokens holds 20 of the
    layer that sees everything, and at most 4 for each of the others: 3 tokens before a chunk of 8."""
    folder, _ = checkpoint
    everything = tmp_path_factory.mktemp("everything")
    tiny_model("gemma3", num_hidden_layers=4, layer_types=["full_attention"] * 4).save_pretrained(everything)
    memory: dict[str, Any] = {"max_total_tokens": 32, "max_num_batched_tokens": 8}
    windows, plain = load(folder, **memory).engine, load(str(everything), **memory).engine
    assert windows.size.nbytes == plain.size.nbytes
    assert (plain.max_model_len, windows.max_model_len) == (32, 80)
    prompt = [(5 * i * i + 3) % VOCABULARY for i in range(79)]
    assert windows.add(prompt, SamplingParams(temperature=0, max_tokens=1)) is not None
    while windows.has_work:
        assert not any(delta.error for delta in windows.step())
    memory["max_total_tokens"] = 128
    assert preemptions(load(folder, **memory).engine) == 0
    assert preemptions(load(str(everything), **memory).engine) > 0


def preemptions(engine: Engine) -> int:
    """Of three sequences of 48 tokens: 48 blocks each, or at most 24."""
    for place in range(3):
        engine.add(
            [(place * 17 + i) % VOCABULARY for i in range(12)],
            SamplingParams(temperature=0, max_tokens=36, ignore_eos=True),
        )
    while engine.has_work:
        engine.step()
    return engine.stats().preemptions
