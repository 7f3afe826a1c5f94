"""Scores on tasks through lm-eval, and which answers changed.

A score alone sees only breakage: its standard error is 2.2 points at 500 questions. Both models are asked the same questions,
so the answers are paired: a *flip* is a question that one of them gets right and the other wrong, and McNemar's test asks
whether the flips go one way more than chance would have it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.config import EngineConfig
from runtime.errors import Error, InvalidRequest
from runtime.evaluation.local_tasks import KINDS, task_config
from runtime.evaluation.scorer import as_config, label


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task. With a reference: its score, how many of the ``items`` answers went from right to wrong
    (``lost``) and from wrong to right (``gained``), and the two-sided p-value of McNemar's exact test. They are ``None`` where
    there is no reference or the metric is not right or wrong question by question. ``filter`` is the task's way of finding
    the answer in what was said; lm-eval's name for none is ``none``."""

    task: str
    metric: str
    filter: str
    items: int
    score: float
    standard_error: float | None
    reference: float | None = None
    lost: int | None = None
    gained: int | None = None
    p_value: float | None = None

    @property
    def label(self) -> str:
        return self.metric if self.filter == "none" else f"{self.metric}, {self.filter}"


@dataclass(frozen=True)
class TaskResults:
    """``recipe`` names the harness and its version: scores of another one do not compare."""

    model: str
    reference: str | None
    recipe: str
    scores: tuple[TaskScore, ...]

    def data(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        against = f" against {self.reference}" if self.reference else ""
        wide = max([12, *(len(one.label) for one in self.scores)])
        head = f"{'task':<24} {'metric':<{wide}} {'items':>6} {'score':>17}"
        head += f" {'reference':>9} {'lost':>5} {'gained':>6} {'p':>7}" if against else ""
        lines = [f"{self.model}{against}  [{self.recipe}]", head]
        for one in self.scores:
            error = "" if one.standard_error is None else f" ± {one.standard_error:.4f}"
            line = f"{one.task:<24} {one.label:<{wide}} {one.items:>6} {one.score:>8.4f}{error:<9}"
            if one.reference is not None:
                line += f" {one.reference:>9.4f}"
            if one.p_value is not None:
                line += f" {one.lost:>5} {one.gained:>6} {one.p_value:>7.3f}"
            lines.append(line)
        return "\n".join(lines)


def evaluate_tasks(
    model: str | EngineConfig,
    tasks: Sequence[str] = ("local",),
    *,
    reference: str | EngineConfig | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    progress: bool = False,
) -> TaskResults:
    """Ask a model, and its reference if one is given, the questions of lm-eval's ``tasks``.

    ``local`` stands for the tasks that need no download. ``include_path`` is a folder of tasks of your own, ``limit`` the
    questions of each. Raises :class:`Error` if lm-eval is not installed and :class:`InvalidRequest` for tasks it does not know.
    """
    if limit is not None and limit < 1:
        raise InvalidRequest(f"--limit {limit}: at least one question of each task must be asked.")
    if include_path is not None and not Path(include_path).is_dir():
        raise InvalidRequest(f"--include-path {include_path}: there is no such folder.")
    names = [local for name in tasks for local in (KINDS if name == "local" else [name])]
    if not names:
        raise InvalidRequest(f"no task: name some, or local for {', '.join(KINDS)}.")
    evaluator, manager, version = _lm_eval(include_path, [name for name in names if name not in KINDS])
    unknown = [name for name in names if name not in KINDS and not manager.match_tasks([name])]
    if unknown:
        raise InvalidRequest(
            f"lm-eval {version} knows no task {', '.join(unknown)}. Local ones: {', '.join(KINDS)}; tasks of your own: "
            "--include-path DIR."
        )
    options = {"limit": limit, "num_fewshot": num_fewshot, "task_manager": manager}
    sides = [as_config(side) for side in (model, reference) if side is not None]
    results = [_run(evaluator, side, names, options, progress) for side in sides]
    scores = _scores(results[0], results[1] if len(results) > 1 else None)
    return TaskResults(label(sides[0]), label(sides[1]) if len(sides) > 1 else None, f"lm-eval {version}", scores)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test: as many heads or more extreme in ``lost + gained`` throws of a coin."""
    flips, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(flips, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**flips)


def _lm_eval(include_path: str | None, wanted: list[str]) -> tuple[Any, Any, str]:
    """lm-eval's evaluator, what knows its tasks, and its version. Its own tasks are thousands of files, which take seconds to
    list: only where one of ``wanted`` is not among the user's."""
    try:
        import lm_eval
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Error(f"tasks need lm-eval ({error}): pip install 'relinear[eval]'.") from error
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in wanted):
        manager = TaskManager(include_path=include_path)
    return evaluator, manager, str(lm_eval.__version__)


def _run(evaluator: Any, config: EngineConfig, names: list[str], options: dict[str, Any], progress: bool) -> Any:
    from runtime.evaluation.harness import open_model

    tasks = [task_config(name) if name in KINDS else name for name in names]
    return evaluator.simple_evaluate(
        open_model(config, progress), tasks=tasks, log_samples=True, bootstrap_iters=0, verbosity="ERROR", **options
    )


def _scores(found: Any, reference: Any) -> tuple[TaskScore, ...]:
    scores = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            samples = _samples(found, task, how)
            theirs = _samples(reference, task, how) if reference else []
            error = values.get(f"{metric}_stderr,{how}")
            own = float(error) if isinstance(error, int | float) else _binomial_error(samples, metric, value)
            other = reference["results"][task].get(key) if reference else None
            flips = _flips(samples, theirs, metric)
            lost, gained = flips or (None, None)
            p_value = mcnemar(*flips) if flips else None
            scores.append(TaskScore(task, metric, how, len(samples), float(value), own, other, lost, gained, p_value))
    return tuple(scores)


def _samples(found: Any, task: str, how: str) -> list[Any]:
    """The answers of a task by one filter; lm-eval logs every question once for each. None for a group of tasks."""
    return [sample for sample in found["samples"].get(task, ()) if sample.get("filter", "none") == how]


def _right(samples: Any, metric: str) -> dict[int, bool] | None:
    """Whether each question was answered right; ``None`` if the metric is not of that kind."""
    marks = {sample["doc_id"]: sample.get(metric) for sample in samples}
    if not marks or not all(mark in (0, 1) for mark in marks.values()):
        return None
    return {item: bool(mark) for item, mark in marks.items()}


def _binomial_error(samples: Any, metric: str, score: float) -> float | None:
    marks = _right(samples, metric)
    return math.sqrt(score * (1 - score) / (len(marks) - 1)) if marks and len(marks) > 1 else None


def _flips(ours: Any, theirs: Any, metric: str) -> tuple[int, int] | None:
    now, before = _right(ours, metric), _right(theirs, metric)
    if now is None or before is None:
        return None
    lost = sum(before[item] and not now[item] for item in before)
    gained = sum(now[item] and not before[item] for item in before)
    return lost, gained
