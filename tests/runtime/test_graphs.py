"""Decoding steps on tensors that stay, as CUDA graphs run them, here without capturing: the same tokens as without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attention.cpu import CpuBackend
from attention.paged import PagedBackend
from runtime import LLM, SamplingParams, assembly
from runtime.config import EngineConfig
from runtime.graphs import CudaCapture, DecodeGraphs, Step, batch_sizes, choose_capture, reserved_bytes
from runtime.replay import StepRecorder
from tests.awq_writer import write_awq
from tests.tiny_models import VOCABULARY, tiny_model

CPU = torch.device("cpu")
PROMPTS = [
    [(7 * place + 3 * i * i) % VOCABULARY for i in range(length)] for place, length in enumerate((11, 13, 5, 19, 1))
]
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
LOADS: dict[str, dict[str, Any]] = {
    "one sequence": {"max_num_seqs": 1},
    "padded": {"max_num_seqs": 8},  # sizes 1, 2, 4, 8 for 5 sequences
    "preempted": {"max_total_tokens": 44, "max_num_seqs": 5},
}


def run_again(step: Step) -> Step:
    """Captures nothing."""
    return step


class Counting:
    """Captures nothing, and counts the steps of each batch size."""

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}

    def __call__(self, step: Step) -> Step:
        def counted() -> Any:
            result = step()
            rows = result.values.shape[0]
            self.steps[rows] = self.steps.get(rows, 0) + 1
            return result

        return counted


@pytest.fixture
def capture_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets what engines of this test capture with, or why they do not."""
    return lambda capture: monkeypatch.setattr(assembly, "choose_capture", lambda *_: capture)


@pytest.fixture(scope="module", params=["llama", "gpt_oss", "gemma2"])  # the last two: windows of 4 tokens, sinks
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    write_awq(tiny_model(request.param, hidden_size=64, intermediate_size=96), folder, group=32)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return str(folder)


def load(folder: str, **options: Any) -> LLM:
    return LLM(
        folder, dtype="float32", skip_tokenizer_init=True, **{"block_size": 4, "max_total_tokens": 512} | options
    )


def tokens_of(llm: LLM, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]


def test_greedy_tokens_are_those_without_graphs(checkpoint: str, capture_by: Callable[[Any], None]) -> None:
    """Across the borders of blocks of 4 tokens, past windows, with rows to spare, with sequences that start again; and a
    second time from cached prefixes."""
    wanted = tokens_of(load(checkpoint, disable_cuda_graph=True))
    for name, options in LOADS.items():
        counting = Counting()
        capture_by(counting)
        llm = load(checkpoint, **options)
        assert tokens_of(llm) == wanted, name
        assert tokens_of(llm) == wanted, f"{name}, again"
        stats = llm.engine.stats()
        assert (stats.preemptions > 0) == (name == "preempted"), stats
        assert stats.prefix_hits or name == "preempted", stats
        assert stats.free_blocks == stats.blocks
        assert sum(counting.steps.values()) > 13 * (5 if name == "one sequence" else 1), counting.steps
        if name == "padded":
            assert counting.steps[8] >= 12, "5 sequences take 8 rows"


def test_samples_scores_and_penalties_are_those_without_graphs(llama: str, capture_by: Callable[[Any], None]) -> None:
    params = [
        SamplingParams(temperature=0.9, seed=4, max_tokens=9, logprobs=2, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.4, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=7, prompt_logprobs=1, ignore_eos=True),
        GREEDY,
        SamplingParams(temperature=1.2, seed=5, top_k=7, max_tokens=11, ignore_eos=True),
    ]
    wanted = load(llama, max_num_batched_tokens=6, disable_cuda_graph=True).generate(PROMPTS, params)
    capture_by(run_again)
    found = load(llama, max_num_batched_tokens=6).generate(PROMPTS, params)
    for left, right in zip(wanted, found, strict=True):
        assert left.outputs[0].token_ids == right.outputs[0].token_ids
        for mine, theirs in zip(left.outputs[0].logprobs or [], right.outputs[0].logprobs or [], strict=True):
            assert sorted(mine) == sorted(theirs)


def test_rows_to_spare_write_to_nobodys_block(llama: str, capture_by: Callable[[Any], None]) -> None:
    """Every page but the scratch block holds, bit for bit, what it held: the whole pool is in use, by 3 of 4 rows."""
    caches = []
    for capture in ("nothing captures", run_again):
        capture_by(capture)
        llm = load(llama, max_total_tokens=36, max_num_seqs=4, startup_check=False, enable_prefix_caching=False)
        cache = llm.engine.runner.cache
        for tensor in (*cache.k, *cache.v):
            tensor.fill_(7.0)
        for prompt in PROMPTS[:3]:
            llm.engine.add(prompt[:5], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        while llm.engine.has_work:
            llm.engine.step()
        caches.append([tensor[: llm.engine.size.blocks].clone() for tensor in (*cache.k, *cache.v)])
    assert cache.blocks == llm.engine.size.blocks + 1
    for plain, captured in zip(*caches, strict=True):
        torch.testing.assert_close(plain, captured, rtol=1e-4, atol=1e-4)
        assert torch.equal(plain == 7, captured == 7)


def test_an_aborted_neighbour_changes_nothing(llama: str, capture_by: Callable[[Any], None]) -> None:
    wanted = tokens_of(load(llama, disable_cuda_graph=True))
    capture_by(run_again)
    core = load(llama, max_num_seqs=8).engine
    uids = [core.add(prompt, GREEDY) for prompt in PROMPTS]
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    for step in range(100):
        for delta in core.step():
            found[delta.uid] += delta.token_ids
        if step == 4:
            core.abort(uids[1])
            uids[1] = core.add(PROMPTS[1], GREEDY)  # in the blocks of the aborted one, in another row
            found[uids[1]] = []
        if not core.has_work:
            break
    assert [found[uid] for uid in uids] == wanted


def test_a_step_that_computes_nan_fails_only_whose_it_is(
    llama: str, capture_by: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(step: Step) -> Step:
        def run() -> Any:
            result = step()
            values = result.values.clone()
            values[1:2] = torch.nan
            return type(result).of(values)

        return run

    wanted = tokens_of(load(llama, disable_cuda_graph=True))
    capture_by(spoiled)
    llm = load(llama, max_num_seqs=8, startup_check=False)
    uids = [llm.engine.add(prompt, GREEDY) for prompt in PROMPTS[:2]]
    deltas = []
    while llm.engine.has_work:
        deltas += llm.engine.step()
    errors = {delta.uid: delta.error for delta in deltas if delta.error}
    assert list(errors) == [uids[1]]
    assert "NaN" in (errors[uids[1]] or "")
    assert [token for delta in deltas if delta.uid == uids[0] for token in delta.token_ids] == wanted[0]


def test_what_cannot_be_captured_runs_without(llama: str, capture_by: Callable[[Any], None]) -> None:
    def refuse(step: Step) -> Step:
        step()
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    wanted = tokens_of(load(llama, disable_cuda_graph=True))
    capture_by(refuse)
    llm = load(llama)
    assert llm.engine.runner.graphs is None
    assert tokens_of(llm) == wanted
    line = next(line for line in llm.engine.report.splitlines() if line.startswith("graphs"))
    assert line.endswith("cannot be captured: RuntimeError: called a synchronizing CUDA operation")


def test_the_report_names_the_sizes(llama: str, capture_by: Callable[[Any], None]) -> None:
    assert "steps of up to 11 sequences, recorded" in load(llama, max_num_seqs=11).engine.report
    capture_by(run_again)
    assert "steps of 1, 2, 4, 8, 11 sequences" in load(llama, max_num_seqs=11).engine.report


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (3, [1, 2, 3]), (4, [1, 2, 4]), (20, [1, 2, 4, 8, 16, 20])])
def test_batch_sizes_end_at_the_most_sequences(most: int, sizes: list[int]) -> None:
    assert batch_sizes(most) == sizes
    assert batch_sizes(1000)[-1] == 256


def test_when_nothing_is_captured() -> None:
    cuda, config = torch.device("cuda"), EngineConfig(model="x")
    paged = PagedBackend()
    assert isinstance(choose_capture(config, cuda, paged, False, False), CudaCapture)
    for scaled_together in (False, True):
        assert isinstance(choose_capture(config, CPU, CpuBackend(None), False, scaled_together), StepRecorder)
    eager = EngineConfig(model="x", disable_cuda_graph=True)
    reasons = [
        choose_capture(config, torch.device("mps"), paged, False, False),
        choose_capture(eager, cuda, paged, False, False),
        choose_capture(eager, CPU, CpuBackend(None), False, False),
        choose_capture(EngineConfig(model="x", native=False), CPU, CpuBackend(None), False, False),
        choose_capture(config, cuda, CpuBackend(None), False, False),
        choose_capture(config, cuda, paged, True, False),
        choose_capture(config, cuda, paged, False, True),
    ]
    for reason, word in zip(
        reasons,
        (
            "not mps",
            "--disable-cuda-graph",
            "--disable-cuda-graph",
            "--no-native",
            "cpu attention",
            "recurrent",
            "left over",
        ),
        strict=True,
    ):
        assert isinstance(reason, str)
        assert word in reason


def test_more_sequences_than_the_largest_graph_run_without(
    llama: str, capture_by: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tokens_of(load(llama, disable_cuda_graph=True))
    counting = Counting()
    capture_by(counting)
    monkeypatch.setattr("runtime.graphs.LARGEST_BATCH", 3)
    assert tokens_of(load(llama)) == wanted
    assert set(counting.steps) <= {1, 2, 3}


def test_memory_is_reserved_for_what_grows_with_the_batch() -> None:
    assert reserved_bytes([1, 2, 4], 1000) < reserved_bytes([1, 2, 4, 8], 1000) < reserved_bytes([1, 2, 4, 8], 100_000)


def test_tables_are_copied_only_when_they_change(llama: str, capture_by: Callable[[Any], None]) -> None:
    """A preempted request that got other blocks, in the same row, must not read the old ones."""
    capture_by(run_again)
    core = load(llama, block_size=4).engine
    graphs = core.runner.graphs
    assert isinstance(graphs, DecodeGraphs)
    core.add(PROMPTS[0], GREEDY)
    core.step()
    for _ in range(6):
        core.step()
        request = core.scheduler.running[0]
        assert graphs._tables[0, 0, : len(request.blocks[0])].tolist() == request.blocks[0]
