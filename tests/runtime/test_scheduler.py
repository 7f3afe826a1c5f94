"""Scheduling and block bookkeeping under random load, without a model."""

from __future__ import annotations

import random

import pytest

from runtime.blocks import BlockPool
from runtime.request import FinishReason, Request, SamplingParams
from runtime.scheduler import SCORED_ROWS, Scheduler


def make_request(uid: int, prompt: int, new: int, **params: int) -> Request:
    settings = SamplingParams(max_tokens=new, **params)
    return Request(uid, 0, list(range(prompt)), settings, new, random.Random(0))


def run_step(scheduler: Scheduler) -> dict[Request, FinishReason]:
    plan = scheduler.schedule()
    assert plan, "there is work, but nothing was planned"
    assert sum(chunk.size for chunk in plan) <= scheduler.max_batched_tokens
    assert len({chunk.request for chunk in plan}) == len(plan)
    for chunk in plan:
        assert chunk.size > 0
        assert chunk.start == chunk.request.computed
        assert len(chunk.request.blocks) >= scheduler.pool.blocks_for(chunk.stop)
    scheduler.pool.check(scheduler.live())
    ended = scheduler.commit(plan, {chunk.request: 7 for chunk in plan if chunk.samples})
    scheduler.pool.check(scheduler.live())
    return ended


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("budget", "blocks"), [(64, 400), (7, 400), (16, 13), (5, 13)])
def test_every_request_ends_with_all_its_tokens(seed: int, budget: int, blocks: int) -> None:
    chance = random.Random(seed)
    scheduler = Scheduler(BlockPool(blocks, 4), budget, max_running=6)
    arriving = [make_request(uid, chance.randint(1, 30), chance.randint(1, 20)) for uid in range(25)]
    everyone, ended = list(arriving), {}
    while arriving or scheduler.has_work:
        if arriving and (not scheduler.has_work or chance.random() < 0.4):
            scheduler.add(arriving.pop())
        ended |= run_step(scheduler)
    assert set(ended) == set(everyone)
    assert all(len(request.output) == request.max_tokens for request in everyone)
    assert scheduler.pool.free == blocks
    assert (scheduler.preemptions > 0) == (blocks == 13)


def test_a_long_prompt_does_not_stall_decoding() -> None:
    scheduler = Scheduler(BlockPool(100, 16), 8, max_running=4)
    chatting = make_request(0, 3, 50)
    scheduler.add(chatting)
    run_step(scheduler)
    scheduler.add(make_request(1, 200, 1))
    before = len(chatting.output)
    for _ in range(20):
        run_step(scheduler)
    assert len(chatting.output) == before + 20


def test_first_come_first_served() -> None:
    scheduler = Scheduler(BlockPool(100, 16), 10, max_running=2)
    requests = [make_request(uid, 4, 3) for uid in range(5)]
    for request in requests:
        scheduler.add(request)
    order = []
    while scheduler.has_work:
        order += sorted(run_step(scheduler), key=lambda request: request.uid)
    assert order == requests


def test_preempted_tokens_are_kept_and_computed_again() -> None:
    scheduler = Scheduler(BlockPool(4, 4), 16, max_running=2)
    old, young = make_request(0, 6, 8), make_request(1, 6, 8)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.preemptions == 0:
        run_step(scheduler)
    assert young in scheduler.waiting
    assert young.computed == 0
    assert not young.blocks
    assert young.output
    assert old in scheduler.running


def test_a_scored_prompt_is_computed_in_small_chunks() -> None:
    scheduler = Scheduler(BlockPool(100, 16), 2048, max_running=4)
    scheduler.add(make_request(0, SCORED_ROWS + 10, 0, prompt_logprobs=0))
    assert [chunk.size for chunk in scheduler.schedule()] == [SCORED_ROWS]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_removing_a_request_in_any_state_frees_its_blocks(steps: int) -> None:
    scheduler = Scheduler(BlockPool(10, 4), 4, max_running=1)
    first, second = make_request(0, 9, 5), make_request(1, 9, 5)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(steps):
        run_step(scheduler)
    scheduler.remove(first)
    scheduler.remove(second)
    scheduler.remove(second)
    assert not scheduler.has_work
    scheduler.pool.check(())


def test_the_integrity_check_sees_a_leak_and_a_shared_block() -> None:
    pool = BlockPool(4, 4)
    leaking, other = make_request(0, 4, 1), make_request(1, 4, 1)
    assert pool.grow(leaking, 4)
    with pytest.raises(AssertionError, match="leaked or shared"):
        pool.check(())
    other.blocks = list(leaking.blocks)
    with pytest.raises(AssertionError, match="leaked or shared"):
        pool.check((leaking, other))


def test_growing_beyond_the_pool_changes_nothing() -> None:
    pool = BlockPool(3, 4)
    request = make_request(0, 30, 1)
    assert pool.grow(request, 9)
    assert not pool.grow(request, 13)
    assert len(request.blocks) == 3
