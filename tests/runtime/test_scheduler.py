"""Scheduling and block bookkeeping under random load, without a model."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

from runtime.blocks import GONE, BlockPool
from runtime.request import FinishReason, Request, SamplingParams
from runtime.scheduler import SCORED_ROWS, Scheduler


def make_request(uid: int, prompt: int, new: int, **params: Any) -> Request:
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
        for table, reach in zip(chunk.request.blocks, scheduler.pool.reaches, strict=True):
            assert len(table) >= scheduler.pool.blocks_for(chunk.stop)
            assert GONE not in table[reach.first(chunk.start) // scheduler.pool.size :]
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
    old, young = make_request(0, 6, 8, cache_salt="a"), make_request(1, 6, 8, cache_salt="b")
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
    other.blocks = [list(table) for table in leaking.blocks]
    with pytest.raises(AssertionError, match="leaked or shared"):
        pool.check((leaking, other))


def finished(pool: BlockPool, request: Request) -> Request:
    """``request`` after it has held, filled and given back its blocks."""
    pool.adopt(request, pool.match(request))
    assert pool.grow(request, len(request))
    pool.register(request, len(request))
    pool.release(request)
    return request


def test_a_full_prefix_is_found_again_and_one_token_is_left() -> None:
    pool = BlockPool(10, 4)
    finished(pool, make_request(0, 12, 1))
    assert [len(pool.match(make_request(1, length, 1)).chain) for length in (4, 5, 12, 13, 40)] == [0, 1, 2, 3, 3]
    pool.check(())


def test_a_prefix_is_found_only_with_the_same_tokens_before_it_and_the_same_salt() -> None:
    pool = BlockPool(10, 4)
    finished(pool, make_request(0, 12, 1))
    other = make_request(1, 12, 1)
    other.prompt[1] = 99
    assert not pool.match(other).chain, "the second block is equal, what stands before it is not"
    assert not pool.match(make_request(2, 12, 1, cache_salt="tenant")).chain
    assert not pool.match(make_request(3, 12, 1, prompt_logprobs=0)).chain, "every position has to be computed"


def test_other_tokens_of_the_same_hash_are_other_tokens() -> None:
    pool = BlockPool(10, 4)
    finished(pool, make_request(0, 12, 1))
    other = make_request(1, 12, 1)
    other.prompt = [token + sys.hash_info.modulus for token in other.prompt]
    assert hash(tuple(other.prompt)) == hash(tuple(range(12)))
    assert not pool.match(other).chain


def test_the_end_of_the_least_recently_used_prefix_goes_first() -> None:
    pool = BlockPool(6, 4)
    finished(pool, make_request(0, 12, 1, cache_salt="old"))
    finished(pool, make_request(1, 12, 1, cache_salt="new"))
    growing = make_request(2, 8, 1, cache_salt="third")
    assert pool.grow(growing, 8)
    assert len(pool.match(make_request(3, 13, 1, cache_salt="old")).chain) == 1
    assert len(pool.match(make_request(4, 13, 1, cache_salt="new")).chain) == 3
    pool.check((growing,))


def test_samples_share_the_blocks_of_their_prompt_in_the_very_first_step() -> None:
    scheduler = Scheduler(BlockPool(100, 4), 2048, max_running=8)
    for index in range(4):
        request = make_request(0, 41, 8)
        request.index = index
        scheduler.add(request)
    assert [chunk.size for chunk in scheduler.schedule()] == [41, 1, 1, 1]
    assert scheduler.pool.count - scheduler.pool.free == 10 + 4
    scheduler.pool.check(scheduler.live())


def test_forgotten_blocks_are_not_found_and_not_lost() -> None:
    pool = BlockPool(4, 4)
    request = finished(pool, make_request(0, 12, 1))
    pool.forget()
    assert not pool.match(request).chain
    pool.check(())
    assert pool.free == 4


def test_growing_beyond_the_pool_changes_nothing() -> None:
    pool = BlockPool(3, 4)
    request = make_request(0, 30, 1)
    assert pool.grow(request, 9)
    assert not pool.grow(request, 13)
    assert len(request.blocks[0]) == 3


def test_running_requests_own_different_slots_and_give_them_back() -> None:
    """Through preemptions and aborts: a slot that leaked would let the scheduler run out, one given twice be shared."""
    chance = random.Random(3)
    scheduler = Scheduler(BlockPool(13, 4), 16, max_running=4)
    arriving = [make_request(uid, chance.randint(1, 30), chance.randint(1, 20)) for uid in range(25)]
    while arriving or scheduler.has_work:
        if arriving:
            scheduler.add(arriving.pop())
        run_step(scheduler)
        if scheduler.running and chance.random() < 0.1:
            scheduler.remove(scheduler.running[0])
        slots = [request.slot for request in scheduler.running]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(4))
        assert all(request.slot is None for request in scheduler.waiting)
    assert scheduler.preemptions > 0
    assert sorted(scheduler._slots) == [0, 1, 2, 3]


@pytest.mark.parametrize("scored", [False, True])
def test_whole_prompts_are_never_cut(scored: bool) -> None:
    scheduler = Scheduler(BlockPool(1000, 4, caching=False), 8, max_running=8, whole_prompts=True)
    params = {"prompt_logprobs": 0} if scored else {}
    prompts = [SCORED_ROWS + 40, 3, 4, 9, 7]
    for uid, length in enumerate(prompts):
        scheduler.add(make_request(uid, length, 5, **params))
    began: list[list[int]] = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        began.append([chunk.size for chunk in plan if chunk.start == 0])
        assert all(chunk.size == 1 for chunk in plan if chunk.start)
        scheduler.commit(plan, {chunk.request: 7 for chunk in plan if chunk.samples})
    assert sorted(size for sizes in began for size in sizes) == sorted(prompts)
    # Only a prompt that has a step to itself, but for decodes, may go beyond the budget.
    assert all(sum(sizes) <= 8 or len(sizes) == 1 for sizes in began)
