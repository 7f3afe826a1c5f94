"""The pairing of answers is McNemar's; local questions have one right answer; lm-eval's interface is kept.

lm-eval is a heavy extra, and one of those for development. Where it is not installed, its one class that we derive from is
stood in for, and what a whole run gives is left out."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from runtime import LLM, EngineConfig, Error, InvalidRequest, evaluate_tasks, load_model
from runtime.cli import main
from runtime.evaluation.local_tasks import ITEMS, KINDS, questions
from runtime.evaluation.tasks import TaskResults, _scores, mcnemar
from runtime.evaluation.text import read_documents

TEXT = read_documents("demo")[0].text


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 1, 0.21875), (1, 5, 0.21875), (10, 0, 2**-9), (7, 7, 1.0)],
)
def test_mcnemar_is_the_binomial_test_of_the_flips(lost: int, gained: int, p_value: float) -> None:
    assert mcnemar(lost, gained) == p_value


def test_answers_are_paired_by_question() -> None:
    def found(marks: list[int]) -> dict[str, Any]:
        samples = [{"doc_id": place, "acc": float(mark)} for place, mark in enumerate(marks)]
        return {"results": {"t": {"alias": "t", "acc,none": sum(marks) / 8}}, "samples": {"t": samples}}

    now, before = found([1, 1, 1, 0, 0, 0, 0, 1]), found([1, 1, 1, 1, 1, 1, 0, 0])
    (score,) = _scores(now, before)
    assert (score.items, score.score, score.reference, score.lost, score.gained) == (8, 0.5, 0.75, 3, 1)
    assert score.p_value == mcnemar(3, 1)
    assert score.standard_error == pytest.approx(math.sqrt(0.25 / 7))
    (alone,) = _scores(now, None)
    assert alone.reference is alone.p_value is None


def test_answers_are_told_apart_by_filter() -> None:
    """lm-eval logs a question once for each of a task's filters, as gsm8k has two; a group has no answers of its own."""

    def found(strict: list[int], flexible: list[int]) -> dict[str, Any]:
        samples = [
            {"doc_id": place, "filter": how, "exact_match": float(mark)}
            for how, marks in (("strict", strict), ("flexible", flexible))
            for place, mark in enumerate(marks)
        ]
        values = {"exact_match,strict": sum(strict) / 4, "exact_match,flexible": sum(flexible) / 4}
        return {"results": {"t": values, "group": {"exact_match,strict": 0.5}}, "samples": {"t": samples}}

    strict, flexible, group = _scores(found([1, 0, 0, 0], [1, 1, 1, 0]), found([1, 1, 1, 0], [1, 1, 0, 0]))
    assert (strict.filter, strict.items, strict.lost, strict.gained) == ("strict", 4, 2, 0)
    assert (flexible.filter, flexible.items, flexible.lost, flexible.gained) == ("flexible", 4, 0, 1)
    assert strict.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert (group.items, group.lost, group.p_value) == (0, None, None)
    shown = str(TaskResults("m", "r", "lm-eval", (strict, flexible)))
    assert "exact_match, strict" in shown
    assert "exact_match, flexible" in shown


@pytest.mark.parametrize("name", KINDS)
def test_local_questions_are_fixed_and_have_one_right_answer(name: str) -> None:
    asked = questions(name)
    assert asked == questions(name)
    assert len(asked) == ITEMS
    assert len({question["text"] for question in asked}) > 0.95 * ITEMS
    for question in asked:
        assert len(set(question["choices"])) == len(question["choices"]) >= 3
    labels = torch.tensor([question["label"] for question in asked]).bincount() / ITEMS
    assert labels.min() > 0.15


def test_the_right_answers_are_right() -> None:
    for question in questions("relinear_brackets"):
        closed = {"(": ")", "[": "]", "{": "}"}
        expected = "".join(closed[sign] for sign in reversed(question["text"]) if sign in closed)
        assert question["choices"][question["label"]] == expected
    for question in questions("relinear_counting"):
        shown = [int(number) for number in question["text"].rstrip(",").split(", ")]
        assert int(question["choices"][question["label"]]) == 2 * shown[-1] - shown[-2]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.instance", "lm_eval.utils"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", object, raising=False)
        monkeypatch.setattr(sys.modules["lm_eval.api.instance"], "Instance", object, raising=False)
        for name in ("get_rolling_token_windows", "make_disjoint_window"):
            monkeypatch.setattr(sys.modules["lm_eval.utils"], name, None, raising=False)
    monkeypatch.delitem(sys.modules, "runtime.evaluation.harness", raising=False)
    from runtime.evaluation import harness

    yield harness
    sys.modules.pop("runtime.evaluation.harness", None)


def test_log_likelihoods_and_answers_are_the_models(harness: Any) -> None:
    llm = LLM("demo-bf16", dtype="float32", max_total_tokens=2048)
    engine_lm = harness.EngineLM(llm)
    tokenizer, model = llm.get_tokenizer(), None
    pairs = [("def main():", "\n    return"), ("import os ", "import sys"), ("", "class A:")]
    found = engine_lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    model = load_model("demo-bf16", dtype="float32")

    def expected(ids: list[int], start: int) -> tuple[float, bool]:
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].detach()
        target = torch.tensor(ids[start:])
        return -F.cross_entropy(logits, target, reduction="sum").item(), bool((logits.argmax(-1) == target).all())

    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = tokenizer(context + continuation)["input_ids"]
        start = len(tokenizer(context.rstrip())["input_ids"]) if context else 1
        assert (value, greedy) == (pytest.approx(expected(ids, start)[0], rel=1e-4), expected(ids, start)[1])
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    (answer,) = engine_lm.generate_until([SimpleNamespace(args=("import ", options))])
    assert answer
    assert "\n" not in answer


@pytest.mark.usefixtures("lm_eval")
def test_rolling_windows_are_lm_evals(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token once; the last window is given as much context as fits. Sums are the model's."""
    engine_lm = harness.EngineLM(LLM("demo-bf16", dtype="float32", max_model_len=32, max_total_tokens=256))
    model = load_model("demo-bf16", dtype="float32")
    text = TEXT[:300]
    ids = engine_lm._ids(text)
    seen: list[tuple[list[int], int]] = []
    real = engine_lm._score
    monkeypatch.setattr(engine_lm, "_score", lambda pairs: seen.extend(pairs) or real(pairs))
    (found,) = engine_lm.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    losses = [
        F.cross_entropy(
            model(torch.tensor([window])).logits[0, :-1].detach()[start - 1 :], torch.tensor(window[start:])
        )
        * (len(window) - start)
        for window, start in seen
    ]
    assert found == pytest.approx(-sum(losses).item(), rel=1e-4)
    assert [token for window, start in seen for token in window[start:]] == ids
    assert len(ids) % 31
    assert all(len(window) == 32 for window, _ in seen)
    assert [start for _, start in seen] == [1] * (len(seen) - 1) + [32 - len(ids) % 31]


@pytest.mark.usefixtures("lm_eval")
def test_a_text_that_begins_with_the_beginning_is_not_given_another(harness: Any) -> None:
    engine_lm = harness.EngineLM(LLM("demo-bf16", dtype="float32", max_total_tokens=256))
    begin = engine_lm._tokenizer.bos_token
    plain = engine_lm._ids("import os", special=True)
    assert plain[0] == engine_lm._start
    assert engine_lm._ids(f"{begin}import os", special=True) == plain


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(Error, match=r"pip install 'relinear\[eval\]'"):
        evaluate_tasks("demo")


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real one, without its own tasks: to list them takes longer than all that is tested here."""
    module = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(module, "TaskManager", partial(module.TaskManager, include_defaults=False))


@pytest.mark.usefixtures("lm_eval")
def test_a_whole_run_with_lm_eval() -> None:
    reference = EngineConfig("demo-bf16", dtype="float32", max_total_tokens=4096)
    found = evaluate_tasks(
        replace(reference, quantization="int3"), ["relinear_argument"], reference=reference, limit=40
    )
    (score,) = found.scores
    assert score.items == 40
    assert score.reference is not None
    assert score.lost is not None
    assert score.gained is not None
    assert score.reference > 0.8
    assert score.lost > 0
    assert 40 * (score.reference - score.score) == pytest.approx(score.lost - score.gained)
    assert score.p_value == mcnemar(score.lost, score.gained)
    assert re.search(r"\[lm-eval 0\.\S+\]", str(found))
    with pytest.raises(InvalidRequest, match="knows no task nothing"):
        evaluate_tasks(reference, ["nothing"])


@pytest.mark.usefixtures("lm_eval")
def test_a_task_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A YAML file and its questions, none of them from anywhere else; from the command line, with a greedy answer."""
    rows = [{"text": "import os\nimport ", "answer": word} for word in ("sys", "no such module")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}, cache_dir: {tmp_path}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    command = [
        "eval",
        "tasks",
        "demo-bf16",
        "--tasks",
        "mine",
        "--include-path",
        str(tmp_path),
        "--reference",
        "demo-bf16",
    ]
    assert main([*command, "--dtype", "float32", "--json"]) == 0
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    assert (score["task"], score["metric"], score["items"]) == ("mine", "exact_match", 2)
    assert score["score"] == score["reference"] <= 0.5
    assert (score["lost"], score["gained"], score["p_value"]) == (0, 0, 1.0)
