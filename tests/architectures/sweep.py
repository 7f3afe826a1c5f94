"""One architecture served by the real engine, against each of its sequences alone through eager Transformers.

The scenario has what goes wrong in practice: prompts longer than the token budget of a step, so they are computed in
chunks beside sequences that decode; a cache too small for all of them, so one is preempted and computed again; a prompt
that starts like another; a request that is aborted in between and leaves its blocks to a later one. Uninitialised memory
holds NaN.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from attention.positions import tempers_rows
from runtime import EngineConfig, LoadError, SamplingParams
from runtime.engine import Engine
from runtime.request import Delta
from tests.architectures.tiny import VOCABULARY, tiny_config
from tests.tiny_models import randomize

TOLERANCE = 2e-4
"""Largest difference of a log-probability, as a part of the largest logit."""
BITE = 1e-3
"""By how much, at least, forgetting the start of a sequence would change its end."""

NEW_TOKENS = 6
BLOCK = 3
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "skip_tokenizer_init": True,
    "block_size": BLOCK,
    "max_num_batched_tokens": 8,
    "max_total_tokens": 12 * BLOCK,
    "max_num_seqs": 3,
}


def _prompts() -> list[list[int]]:
    prompts = [random.Random(length).choices(range(3, VOCABULARY), k=length) for length in (11, 13, 1, 7, 10)]
    prompts[4][:8] = prompts[1][:8]
    return prompts


PROMPTS = _prompts()


@dataclass(frozen=True)
class Finding:
    """``verdict`` is ``exact``, ``refused``, ``wrong`` or ``not built``; ``note`` says how, or why not."""

    model_type: str
    verdict: str
    note: str = ""


def examine(model_type: str, **options: Any) -> Finding:
    """Build, save, serve and compare one type; ``options`` are the engine's, on top of :data:`ENGINE`."""
    try:
        model = eager_model(model_type)
        alone(model, PROMPTS[0])
    except Exception as error:
        return Finding(model_type, "not built", _line(error))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tiny_config(model_type).save_pretrained(folder)  # a part of it may have been enough to build the model
        try:
            engine = Engine(EngineConfig(model=folder, **ENGINE | options))
        except LoadError as error:
            return Finding(model_type, "refused", _line(error).replace(f"{folder}: ", ""))
        answers = serve(engine)
    wrong = [fault for place, answer in answers.items() if (fault := compare(model, PROMPTS[place], answer))]
    if wrong:
        return Finding(model_type, "wrong", "; ".join(wrong))
    return Finding(model_type, "exact", how(engine))


def how(engine: Engine) -> str:
    """What the engine minds beside causal attention through pages."""
    specs, model = engine.runner.specs, engine.loaded.model
    traits = [name for name in ("window", "chunk", "softcap", "sinks") if any(getattr(spec, name) for spec in specs)]
    traits += ["latents instead of keys and values"] * any(spec.latent for spec in specs)
    traits += ["keys and values of unlike size"] * any(s.key_dim != s.value_dim and not s.latent for s in specs)
    if sharing := sum(spec.shares is not None for spec in specs):
        traits.append(f"{sharing} layers share keys and values of others")
    layers = engine.loaded.plan.config.get_text_config(decoder=True).num_hidden_layers
    if len(specs) > layers:
        traits.append(f"{len(specs)} attention calls in {layers} layers, a cache slot for each")
    mixers = engine.layers.mixers
    if mixers:
        traits.append(f"{len(mixers)} recurrent layers, a state for each sequence")
    if not all(mixer.continues for mixer in mixers):
        traits.append("prompts in one piece")
    if any(tempers_rows(module) for module in model.modules()):
        traits.append("queries scaled by position instead of row")
    return ", ".join(traits)


def eager_model(model_type: str) -> PreTrainedModel:
    config = tiny_config(model_type)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model = randomize(model).eval()
    model.generation_config = type(model.generation_config)()  # of sampling, and some defaults do not validate
    return model


@dataclass
class Answer:
    """What the engine gave for one prompt: tokens, their log-probabilities [new, vocabulary], those of the prompt."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt_logprobs: list[float]


def serve(engine: Engine) -> dict[int, Answer]:
    """Answers to :data:`PROMPTS` by place."""
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=VOCABULARY)
    scored = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=VOCABULARY, prompt_logprobs=0
    )
    answers: dict[int, Answer] = {}
    places: dict[int, int] = {}

    def add(place: int, params: SamplingParams = greedy) -> int:
        uid = engine.add(PROMPTS[place], params)
        places[uid] = place
        answers[place] = Answer([], [], [])
        return uid

    def step() -> None:
        for delta in engine.step():
            _collect(answers, places, delta)

    doomed = add(0)
    add(1)
    step()
    step()
    engine.abort(doomed)
    places.pop(doomed)
    add(0, scored)
    add(2)
    step()
    add(3)
    add(4)
    while engine.has_work:
        step()
    return answers


def _collect(answers: dict[int, Answer], places: dict[int, int], delta: Delta) -> None:
    if delta.error:
        raise AssertionError(delta.error)
    if delta.uid in places:
        answer = answers[places[delta.uid]]
        answer.tokens += delta.token_ids
        answer.logprobs += [dict(scored.top) for scored in delta.logprobs]
        answer.prompt_logprobs += [scored.logprob for scored in delta.prompt_logprobs]


@torch.no_grad()
def alone(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of one sequence by itself."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, :VOCABULARY].float()


def compare(model: PreTrainedModel, prompt: list[int], answer: Answer) -> str | None:
    """What is wrong with an answer; ``None``: nothing."""
    ids = prompt + answer.tokens
    logits = alone(model, ids)
    if not logits.isfinite().all():
        return "Transformers' own logits are not finite"
    wanted = logits.log_softmax(-1)
    last = wanted[len(prompt) - 1 : -1]
    tokens = last.argmax(-1).tolist()
    got = torch.tensor([[row[token] for token in range(VOCABULARY)] for row in answer.logprobs])
    bound = TOLERANCE * float(logits.abs().max())
    error = float((got - last).abs().max())
    if answer.prompt_logprobs:
        chosen = wanted[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        error = max(error, float((torch.tensor(answer.prompt_logprobs) - chosen).abs().max()))
    if error > bound or tokens != answer.tokens:
        return f"{len(prompt)} prompt tokens: log-probabilities differ by {error:.2g}, {bound:.2g} allowed"
    return None


def bite(model: PreTrainedModel) -> float:
    """How much the last logits of a sequence change with its first token, as a part of the largest."""
    ids = PROMPTS[0]
    logits = alone(model, ids)
    return float((logits - alone(model, [ids[0] + 1, *ids[1:]]))[-1].abs().max() / logits.abs().max())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
