"""The Python API on the bundled model: shapes of outputs, stopping, seeds, scores, refusals, faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attention.kv_dtypes import DTYPES
from runtime import LLM, EngineDead, InvalidRequest, LoadError, Overloaded, SamplingParams
from runtime.detokenize import Detokenizer
from runtime.graphs import Logits
from runtime.runner import Runner, StepResult

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPTS = ["def main():\n", "import os\n", "class Stack:\n    def push(self, item):\n", "x = ["]

ENDING = [
    "def fibonacci(n):",
    "def main():\n",
    "def add(a, b):\n    return",
    "if __name__ == '__main__':\n",
    "def close(self):\n",
]
"""Prompts after which the model is likely to write the end token."""


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", dtype="float32")


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    """After every test the engine is idle and every block is free."""
    yield
    assert not llm.engine.has_work
    assert llm.engine.stats().free_blocks == llm.engine.stats().blocks
    assert not llm.engine._live
    assert not llm.engine._texts


def test_outputs_are_in_order_and_shaped_like_vllms(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        sample = output.outputs[0]
        assert output.finished
        assert output.prompt_token_ids == llm.engine.encode(output.prompt or "")
        assert 0 < len(sample.token_ids) <= 24
        assert sample.finish_reason in ("length", "stop")
        assert sample.text == llm.get_tokenizer().decode(sample.token_ids, skip_special_tokens=True)


def test_one_prompt_alone_and_token_ids_give_the_same(llm: LLM) -> None:
    together = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
    ids = [llm.engine.encode(prompt) for prompt in PROMPTS]
    assert [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS] == together
    assert [output.outputs[0].token_ids for output in llm.generate(ids, GREEDY)] == together
    assert llm.generate(ids[0], GREEDY)[0].outputs[0].token_ids == together[0]
    assert llm.generate([], GREEDY) == []


def test_streaming_gives_the_same_text_in_pieces(llm: LLM) -> None:
    whole = [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY)]
    pieces = [""] * len(PROMPTS)
    for place, delta in llm.stream(PROMPTS, GREEDY):
        pieces[place] += delta.text
    assert pieces == whole


def test_a_stream_that_is_not_read_to_the_end_is_aborted(llm: LLM) -> None:
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.has_work


def test_a_stream_and_a_call_in_between_get_what_is_theirs(llm: LLM) -> None:
    whole = [output.outputs[0].text for output in llm.generate(PROMPTS[:2], GREEDY)]
    stream = llm.stream(PROMPTS[0], GREEDY)
    first = next(stream)[1].text
    assert llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].text == whole[1]
    assert first + "".join(delta.text for _, delta in stream) == whole[0]


def test_an_interrupted_call_leaves_nothing_running(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Runner, plan: Any) -> StepResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert not llm.engine.has_work


def test_prompts_may_be_arrays_and_parameters_positional() -> None:
    llm = LLM("demo", "awq", "float32")
    ids = torch.tensor([520, 1218, 66])
    expected = llm.generate(ids.tolist(), GREEDY)[0].outputs[0].token_ids
    for prompt in (ids, ids.numpy(), [ids], tuple(ids.tolist())):
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == expected
    assert llm.score(ids).token_ids == ids.tolist()
    with pytest.raises(InvalidRequest, match="must be SamplingParams"):
        llm.generate("a", {"temperature": 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(6))
def test_a_seed_gives_the_same_tokens_whatever_the_batch_mates(llm: LLM, seed: int) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=seed, max_tokens=20)
    alone = llm.generate(PROMPTS[0], params)[0].outputs[0].token_ids
    other = SamplingParams(temperature=1.3, max_tokens=9)
    mixed = llm.generate([PROMPTS[2], PROMPTS[0], PROMPTS[1]], [other, params, GREEDY])
    assert mixed[1].outputs[0].token_ids == alone
    assert (
        llm.generate(PROMPTS[0], SamplingParams(temperature=1.0, top_p=0.95, seed=seed + 100, max_tokens=20))[0]
        .outputs[0]
        .token_ids
        != alone
    )


def test_samples_of_one_prompt_differ(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=12)
    first, second = (llm.generate(PROMPTS[1], params)[0].outputs for _ in range(2))
    assert [sample.index for sample in first] == [0, 1, 2, 3]
    assert len({tuple(sample.token_ids) for sample in first}) > 1
    assert [sample.token_ids for sample in first] == [sample.token_ids for sample in second]


def test_stop_strings_and_stop_tokens(llm: LLM) -> None:
    plain = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0]
    text, ids = plain.text, plain.token_ids
    stop = text[3:6]
    sample = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, stop=stop))[0].outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == (text[: text.index(stop)], "stop", stop)
    params = SamplingParams(temperature=0, max_tokens=24, stop=stop, include_stop_str_in_output=True)
    assert llm.generate(PROMPTS[0], params)[0].outputs[0].text == text[: text.index(stop) + len(stop)]
    token = ids[2]
    sample = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token]))[0].outputs[
        0
    ]
    assert sample.token_ids == ids[: ids.index(token) + 1]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", token)
    assert text.startswith(sample.text)
    assert not sample.text.endswith(llm.get_tokenizer().decode([token]))


def test_the_end_token_ends_unless_it_is_ignored_or_too_early(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    answers = llm.generate(ENDING, SamplingParams(temperature=0, max_tokens=150))
    prompt, ended = next((a.prompt, a.outputs[0]) for a in answers if a.outputs[0].finish_reason == "stop")
    assert ended.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token not in ended.text
    assert ended.stop_reason is None
    length = len(ended.token_ids)
    for options in ({"ignore_eos": True}, {"min_tokens": length + 3}):
        params = SamplingParams(temperature=0, max_tokens=length + 5, **options)
        longer = llm.generate(prompt or "", params)[0].outputs[0]
        assert longer.token_ids[: length - 1] == ended.token_ids[:-1]
        assert (longer.token_ids[length - 1] == tokenizer.eos_token_id) == params.ignore_eos
        assert len(longer.token_ids) >= length + 3


def test_logprobs_are_of_the_chosen_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3)
    sample = llm.generate(PROMPTS[0], params)[0].outputs[0]
    assert sample.logprobs is not None
    assert len(sample.logprobs) == len(sample.token_ids)
    for token, row in zip(sample.token_ids, sample.logprobs, strict=True):
        assert row[token].rank == 1, "greedy takes the most likely"
        assert len(row) == 3
        assert row[token].decoded_token == llm.get_tokenizer().decode([token])
    assert sample.cumulative_logprob == pytest.approx(
        sum(row[t].logprob for t, row in zip(sample.token_ids, sample.logprobs, strict=True))
    )


def test_scores_are_those_of_the_plain_model(llm: LLM) -> None:
    from runtime import load_model

    ids = llm.engine.encode("def add(a, b):\n    return a + b\n" * 30)
    with torch.inference_mode():
        logprobs = load_model("demo", dtype="float32")(torch.tensor([ids])).logits[0].log_softmax(-1)
    scores = llm.score(ids, top_k=2)
    expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert len(ids) > 300, "longer than one chunk of scored rows"
    assert scores.logprobs[0] is None
    torch.testing.assert_close(torch.tensor(scores.logprobs[1:]), expected, atol=2e-4, rtol=0)
    assert [row[0][0] for row in scores.top[1:]] == logprobs[:-1].argmax(-1).tolist()
    assert llm.score(ids[:1]).logprobs == [None]


def test_prompt_logprobs_beside_generation(llm: LLM) -> None:
    output = llm.generate(PROMPTS[2], SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1))[0]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    assert all(token in row for token, row in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True))
    assert output.outputs[0].token_ids == llm.generate(PROMPTS[2], GREEDY)[0].outputs[0].token_ids[:3]


# Refusals


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([5, -1], {}, "-1 is not a token id"),
        ([4096], {}, r"4096 is not a token id of this model \(0 to 4095\)"),
        ([5, "a"], {}, "'a' is not a token id"),
        ([5] * 1020, {"max_tokens": 10}, r"1020 tokens and asks for 10 more.*1024 tokens.*lower max_tokens to 4"),
        ([5] * 2000, {"max_tokens": None}, "2000 tokens"),
        ([5], {"stop_token_ids": [5000]}, "stop_token_ids must be below 4096"),
        ([5], {"max_tokens": 0}, "needs prompt_logprobs"),
        ([5], {"max_tokens": 0, "prompt_logprobs": 0, "n": 2}, "n = 1"),
    ],
)
def test_what_can_never_be_served_is_refused(llm: LLM, prompt: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate([prompt], SamplingParams(**params))


def test_one_bad_prompt_queues_none_of_them(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="prompt 1: "):
        llm.generate(["good", [9999], "good"], GREEDY)
    assert not llm.engine.has_work


def test_parameters_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="3 prompts came with 2"):
        llm.generate(PROMPTS[:3], [GREEDY, GREEDY])


def test_chat_needs_a_template(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_an_unknown_option_suggests_the_known() -> None:
    with pytest.raises(TypeError, match="Did you mean max_model_len"):
        LLM("demo", max_modl_len=5)


def test_a_context_beyond_the_cache_names_what_fits() -> None:
    with pytest.raises(LoadError, match=r"max_model_len 512 needs .* has 64 tokens.*Lower max_model_len to 64"):
        LLM("demo", max_model_len=512, max_total_tokens=64)
    with pytest.raises(LoadError, match=r"takes .* available\. At most \d+ tokens fit"):
        LLM("demo", max_total_tokens=10**12)
    with pytest.raises(LoadError, match=r"max_model_len 3000 is more than the 1024 positions"):
        LLM("demo", max_model_len=3000)


@pytest.mark.parametrize("kv_cache_dtype", ["bf16", "fp8_e4m3", "int8"])
def test_a_quantized_cache_costs_little(llm: LLM, kv_cache_dtype: str) -> None:
    """Scores of a text through it, and what the report says of its price."""
    ids = llm.get_tokenizer()("def main():\n    parser = argparse.ArgumentParser()\n")["input_ids"]
    stored = LLM("demo", dtype="float32", max_total_tokens=256, kv_cache_dtype=kv_cache_dtype)
    pairs = zip(stored.score(ids).logprobs[1:], llm.score(ids).logprobs[1:], strict=True)
    assert max(abs(got - wanted) for got, wanted in pairs) < 0.5
    assert f"in {DTYPES[kv_cache_dtype]}".replace("torch.", "") in stored.report


def test_an_unknown_cache_dtype_is_refused() -> None:
    with pytest.raises(LoadError, match="'fp4'; known: auto, bf16, fp16, fp32, fp8_e4m3, int8"):
        LLM("demo", kv_cache_dtype="fp4")


def test_without_a_tokenizer() -> None:
    llm = LLM("demo", skip_tokenizer_init=True)
    assert llm.get_tokenizer() is None
    sample = llm.generate([[520, 1218]], GREEDY)[0].outputs[0]
    assert sample.token_ids
    assert sample.text == ""
    with pytest.raises(InvalidRequest, match="needs a tokenizer"):
        llm.generate("text", GREEDY)
    with pytest.raises(InvalidRequest, match="stop strings need a tokenizer"):
        llm.generate([[5]], SamplingParams(stop="x"))


# Faults


def test_a_failed_forward_ends_everyone_and_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM("demo")
    real, calls = Runner.run, []

    def fails_later(self: Runner, plan: Any) -> StepResult:
        calls.append(plan)
        if len(calls) == 3:
            raise RuntimeError("the device fell off")
        return real(self, plan)

    monkeypatch.setattr(Runner, "run", fails_later)
    with pytest.raises(EngineDead, match="RuntimeError: the device fell off"):
        llm.generate(PROMPTS, GREEDY)
    with pytest.raises(EngineDead, match="fell off"):
        llm.generate("again", GREEDY)
    assert not llm.engine._live


def test_logits_that_are_not_finite_end_that_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].token_ids
    real = Runner._forward

    def poisons_the_first(self: Runner, *arguments: Any) -> Logits:
        values = real(self, *arguments).values
        if values.shape[0] == 2:
            values[0] = torch.nan
        return Logits.of(values)

    monkeypatch.setattr(Runner, "_forward", poisons_the_first)
    bad, good = llm.generate(PROMPTS[:2], GREEDY)
    assert bad.outputs[0].finish_reason == "error"
    assert "NaN" in (bad.outputs[0].error or "")
    assert good.outputs[0].token_ids == expected


def test_a_form_is_kept_and_a_bad_one_refused(llm: LLM) -> None:
    form = SamplingParams(n=2, seed=1, max_tokens=20, structured_outputs={"regex": "[0-9]{2}:[0-9]{2}"})
    for sample in llm.generate(PROMPTS[3], form)[0].outputs:
        assert len(sample.text) == 5
        assert sample.text[2] == ":"
        assert sample.finish_reason == "stop"
    for bad in ({}, {"regex": "["}, {"regex": "a", "choice": ["b"]}, {"yaml": "x"}):
        with pytest.raises(InvalidRequest, match="structured_outputs"):
            llm.generate(PROMPTS[0], SamplingParams(structured_outputs=bad))


def test_an_exception_of_the_tokenizer_ends_that_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].token_ids
    real, fed = Detokenizer.feed, []

    def fails_once(self: Detokenizer, token: int, **options: bool) -> str:
        fed.append(token)
        if len(fed) == 5:
            raise RuntimeError("unreadable")
        return real(self, token, **options)

    monkeypatch.setattr(Detokenizer, "feed", fails_once)
    outputs = llm.generate(PROMPTS[:2], GREEDY)
    assert outputs[0].outputs[0].error == "RuntimeError: unreadable"
    assert outputs[1].outputs[0].token_ids == expected


def test_a_full_queue_and_a_long_wait() -> None:
    llm = LLM("demo", max_num_seqs=1, max_queued_requests=2, queue_timeout=0.05, startup_check=False)
    with pytest.raises(Overloaded, match="3 requests run or wait and 1 more"):
        llm.generate([PROMPTS[0]] * 4, GREEDY)
    assert not llm.engine.has_work
    outputs = llm.generate(PROMPTS[:2], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "abort"]
    assert "queue_timeout is 0.05 s" in (outputs[1].outputs[0].error or "")


def test_abort_in_every_state(llm: LLM) -> None:
    engine = llm.engine
    uids = [engine.add(PROMPTS[0], GREEDY) for _ in range(40)]
    engine.step()
    engine.step()
    stats = engine.stats()
    assert stats.running > 0
    assert stats.waiting > 0
    assert all(engine.abort(uid) for uid in uids)
    assert not engine.abort(uids[0])
    assert engine.step() == []
