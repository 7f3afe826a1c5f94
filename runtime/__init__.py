"""relinear: serve quantized language models with Transformers' own modelling code.

    from runtime import LLM, SamplingParams
    llm = LLM("demo", quantization="awq")
    print(llm.generate("def fibonacci(n):", SamplingParams(temperature=0))[0].outputs[0].text)

Names are imported when they are first used, so that ``import runtime`` is quick and touches no device.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.config import EngineConfig
    from runtime.engine import Engine
    from runtime.errors import EngineDead, Error, InvalidRequest, LoadError, Overloaded
    from runtime.evaluation.compare import Comparison, compare
    from runtime.evaluation.estimate import Estimate
    from runtime.evaluation.gate import GateResult, gate
    from runtime.evaluation.perplexity import Perplexity, perplexity
    from runtime.evaluation.tasks import TaskResults, evaluate_tasks
    from runtime.inspection import inspect
    from runtime.llm import LLM
    from runtime.loader import load_model
    from runtime.outputs import CompletionOutput, Logprob, RequestOutput, Scores
    from runtime.request import Delta, FinishReason, SamplingParams

_HOME = {
    "LLM": "llm",
    "SamplingParams": "request",
    "EngineConfig": "config",
    "load_model": "loader",
    "inspect": "inspection",
    "Engine": "engine",
    "Delta": "request",
    "FinishReason": "request",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "Scores": "outputs",
    "compare": "evaluation.compare",
    "Comparison": "evaluation.compare",
    "Estimate": "evaluation.estimate",
    "perplexity": "evaluation.perplexity",
    "Perplexity": "evaluation.perplexity",
    "gate": "evaluation.gate",
    "GateResult": "evaluation.gate",
    "evaluate_tasks": "evaluation.tasks",
    "TaskResults": "evaluation.tasks",
    "Error": "errors",
    "LoadError": "errors",
    "InvalidRequest": "errors",
    "Overloaded": "errors",
    "EngineDead": "errors",
}

__all__ = [
    "LLM",
    "Comparison",
    "CompletionOutput",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "Error",
    "Estimate",
    "FinishReason",
    "GateResult",
    "InvalidRequest",
    "LoadError",
    "Logprob",
    "Overloaded",
    "Perplexity",
    "RequestOutput",
    "SamplingParams",
    "Scores",
    "TaskResults",
    "compare",
    "evaluate_tasks",
    "gate",
    "inspect",
    "load_model",
    "perplexity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    value = getattr(import_module(f"runtime.{_HOME[name]}"), name)
    globals()[name] = value
    return value
