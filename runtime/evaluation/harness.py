"""The engine as a model of lm-eval: log-likelihoods and greedy answers, all requests at once through continuous batching."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from runtime.errors import Error
from runtime.llm import LLM
from runtime.outputs import RequestOutput
from runtime.request import SamplingParams

MAX_NEW_TOKENS = 256
"""Where a task does not say, as lm-eval's own Transformers model has it."""


class EngineLM(LM):
    """``LLM`` under lm-eval's interface."""

    def __init__(self, llm: LLM, progress: bool = False):
        super().__init__()
        self.llm = llm
        self._tokenizer = llm.get_tokenizer()
        self._progress = progress

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [self._encode_pair(*instance.args) for instance in requests]
        return self._score([(ids, start) for ids, start in pairs])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Windows of the longest length the engine takes, every token scored once, behind lm-eval's contexts."""
        room = self.llm.engine.max_model_len - 1
        windows: list[tuple[list[int], int]] = []
        owners: list[int] = []
        for owner, instance in enumerate(requests):
            ids = self._ids(instance.args[0])
            for pair in get_rolling_token_windows(ids, prefix_token=self._start, max_seq_len=room, context_len=1):
                context, part = make_disjoint_window(pair)
                windows.append(([*context, *part], len(context)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (loss, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += loss
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        prompts, params = [], []
        for instance in requests:
            text, options = instance.args
            options = dict(options)
            until = options.pop("until", None) or []
            length = int(options.pop("max_gen_toks", options.pop("max_new_tokens", MAX_NEW_TOKENS)))
            sampled = bool(options.pop("do_sample", False))
            temperature = float(options.pop("temperature", 0.0)) if sampled else 0.0
            ids = self._ids(text, special=True)
            length = min(length, self.llm.engine.max_model_len - 1)
            room = self.llm.engine.max_model_len - length
            prompts.append(ids[-room:])  # as lm-eval: of a prompt that is too long, the end matters
            params.append(
                SamplingParams(
                    temperature=temperature,
                    max_tokens=length,
                    stop=[until] if isinstance(until, str) else [stop for stop in until if stop],
                    **{name: options[name] for name in ("top_p", "top_k") if sampled and name in options},
                )
            )
        return [output.outputs[0].text for output in self._generate(prompts, params)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self._tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.engine.config.model).replace("/", "__")

    @property
    def _start(self) -> int:
        """What a text begins with where nothing stands before it."""
        start = self._tokenizer.bos_token_id
        return int(self._tokenizer.eos_token_id if start is None else start)

    def _ids(self, text: str, special: bool = False) -> list[int]:
        """``special``: with what the tokenizer puts around a text, unless the text (a chat's) begins with it already."""
        begin = self._tokenizer.bos_token
        special = special and not (begin and text.startswith(begin))
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both together, and where those of the continuation start. As lm-eval's ``_encode_pair``: spaces at the end of
        the context belong to the continuation, and both are tokenised as one."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return [self._start, *self._ids(continuation)], 1
        whole = self._ids(context + continuation, special=True)
        return whole, len(self._ids(context, special=True))

    def _score(self, pairs: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of ``ids[start:]``, and whether each was the likeliest token."""
        longest = self.llm.engine.max_model_len
        cut = [(ids[-longest:], max(1, start - max(0, len(ids) - longest))) for ids, start in pairs]
        params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1)
        results = []
        for (ids, start), output in zip(cut, self._generate([ids for ids, _ in cut], params), strict=True):
            rows = (output.prompt_logprobs or [])[start:]
            chosen = [row[token] for row, token in zip(rows, ids[start:], strict=True) if row is not None]
            results.append((sum(entry.logprob for entry in chosen), all(entry.rank == 1 for entry in chosen)))
        return results

    def _generate(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
        outputs = self.llm.generate(prompts, params, use_tqdm=self._progress)
        failed = next((sample.error for output in outputs for sample in output.outputs if sample.error), None)
        if failed:
            raise Error(f"{self.llm.engine.config.model}: {failed}")
        return outputs


def open_model(config: Any, progress: bool) -> EngineLM:
    """The model of an :class:`EngineConfig`, loaded."""
    return EngineLM(LLM(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}), progress)
