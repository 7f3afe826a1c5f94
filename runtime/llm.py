"""The Python API: loops around ``Engine.step``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import Error, InvalidRequest
from runtime.outputs import CompletionOutput, RequestOutput, Scores
from runtime.request import Delta, SamplingParams

Prompt = str | Sequence[int]


class LLM:
    """A loaded model that answers prompts.

    All options are fields of :class:`EngineConfig`, which explains them; those not named here (``kernel``,
    ``kv_cache_memory``, ``skip_tokenizer_init`` and so on) by keyword. Raises :class:`LoadError`.
    """

    def __init__(
        self,
        model: str | Path,
        quantization: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        **options: Any,
    ):
        config = EngineConfig.from_options(
            model=str(model),
            quantization=quantization,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            trust_remote_code=trust_remote_code,
            revision=revision,
            **options,
        )
        self.engine = Engine(config)
        self._inbox: dict[int, deque[Delta]] = {}

    @property
    def report(self) -> str:
        """What was loaded: format, bits, kernel and why, bytes, KV cache."""
        return self.engine.report

    def get_tokenizer(self) -> Any:
        """Transformers' tokenizer of the model, ``None`` with ``skip_tokenizer_init``."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's ``generation_config.json`` asks for; :class:`SamplingParams`'s own defaults otherwise."""
        return SamplingParams(**self.engine.sampling_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer prompts, texts or lists of token ids, in their order; they run together.

        One ``SamplingParams`` for all or one each. Raises :class:`InvalidRequest` before anything runs if one of them can
        never be served, :class:`EngineDead` if a forward pass failed. One whose own logits were NaN has the finish reason
        ``error``; the others are not affected.
        """
        return list(self.completed(prompts, sampling_params, use_tqdm=use_tqdm))

    def completed(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> Iterator[RequestOutput]:
        """The same, one output after the other in the order of the prompts, each as soon as it and those before it are
        complete."""
        outputs = self._submit(prompts, sampling_params)
        waiting = deque(outputs.values())
        with tqdm(total=len(outputs), desc="prompts", disable=not use_tqdm) as bar:
            for delta in self._deltas(outputs):
                output = outputs[delta.uid]
                before = output.finished
                output.extend(delta, self.engine.tokenizer)
                bar.update(output.finished and not before)
                while waiting and waiting[0].finished:
                    yield waiting.popleft()

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, Delta]]:
        """Yield ``(position of the prompt, Delta)`` as tokens come. Closing the iterator aborts what is left."""
        outputs = self._submit(prompts, sampling_params)
        position = {uid: place for place, uid in enumerate(outputs)}
        for delta in self._deltas(outputs):
            yield position[delta.uid], delta

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template_options: Any,
    ) -> RequestOutput:
        """Answer a conversation, rendered by the tokenizer's own chat template."""
        tokenizer = self.engine.tokenizer
        template = template_options.get("chat_template") or getattr(tokenizer, "chat_template", None)
        if tokenizer is None or not template:
            raise InvalidRequest("this model has no chat template; use generate with a plain prompt.")
        options = {"add_generation_prompt": True, **template_options, "return_dict": False}
        return self.generate([tokenizer.apply_chat_template(list(messages), **options)], sampling_params)[0]

    def score(self, token_ids: Sequence[int], top_k: int = 0) -> Scores:
        """Log-probability of every token of a sequence given those before it, through the engine, and the ``top_k`` most
        likely tokens at each place."""
        ids = _as_list(token_ids)
        outputs = self._submit([ids], SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=top_k))
        rows = [row for delta in self._deltas(outputs) for row in delta.prompt_logprobs]
        first: list[float | None] = [None]
        return Scores(ids, first + [row.logprob for row in rows], [[], *(list(row.top) for row in rows)])

    def _submit(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> dict[int, RequestOutput]:
        """Queue prompts; their empty outputs by uid. None is queued if one is refused."""
        listed: Any = prompts if isinstance(prompts, str) else _as_list(prompts)
        single = isinstance(listed, str) or (len(listed) > 0 and isinstance(listed[0], int))
        many: list[Any] = [listed] if single else listed
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(many)
        else:
            each = list(params)
        if not all(isinstance(settings, SamplingParams) for settings in each):
            raise InvalidRequest("sampling parameters must be SamplingParams, e.g. SamplingParams(temperature=0).")
        if len(each) != len(many):
            raise InvalidRequest(
                f"{len(many)} prompts came with {len(each)} sampling parameters; give one, or one each."
            )
        outputs: dict[int, RequestOutput] = {}
        for place, (prompt, settings) in enumerate(zip(many, each, strict=True)):
            try:
                uid = self.engine.add(prompt if isinstance(prompt, str) else _as_list(prompt), settings)
            except Error as error:
                for queued in outputs:
                    self.engine.abort(queued)
                raise type(error)(f"prompt {place}: {error}" if len(many) > 1 else str(error)) from error
            ids = list(self.engine.request(uid).prompt)
            samples = [CompletionOutput(index) for index in range(settings.n)]
            outputs[uid] = RequestOutput(str(uid), prompt if isinstance(prompt, str) else None, ids, samples)
        return outputs

    def _deltas(self, outputs: Mapping[int, RequestOutput]) -> Iterator[Delta]:
        """Turn the engine until these requests have ended; abort what is left if the caller stops or is interrupted.

        Several such loops may be open at once, a stream and a call in between: a delta of another loop waits in its inbox.
        """
        inbox: deque[Delta] = deque()
        self._inbox |= dict.fromkeys(outputs, inbox)
        left = sum(len(output.outputs) for output in outputs.values())
        try:
            while left:
                if not inbox:
                    for delta in self.engine.step():
                        if delta.uid in self._inbox:
                            self._inbox[delta.uid].append(delta)
                while inbox:
                    left -= inbox[0].finish_reason is not None
                    yield inbox.popleft()
            self.engine.require_alive()
        finally:
            for uid in outputs:
                self.engine.abort(uid)
                self._inbox.pop(uid)


def _as_list(values: Any) -> list[Any]:
    """A list of what may be an array, a tensor or any iterable."""
    return values.tolist() if hasattr(values, "tolist") else list(values)
