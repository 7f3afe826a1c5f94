"""The Python API: loops around ``Engine.step``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import Error, InvalidRequest
from runtime.outputs import CompletionOutput, RequestOutput, Scores
from runtime.request import Delta, SamplingParams

Prompt = str | Sequence[int]


class LLM:
    """A loaded model that answers prompts.

    ``options`` are the fields of :class:`EngineConfig`: ``quantization``, ``kernel``, ``dtype``, ``device``,
    ``max_model_len``, ``max_num_batched_tokens``, ``kv_cache_memory``, ``trust_remote_code``, ``revision`` and so on.
    Raises :class:`LoadError`.
    """

    def __init__(self, model: str, **options: Any):
        self.engine = Engine(EngineConfig.from_options(model=str(model), **options))

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
        outputs = self._submit(prompts, sampling_params)
        with tqdm(total=len(outputs), desc="prompts", disable=not use_tqdm) as bar:
            for delta in self._deltas(outputs):
                output = outputs[delta.uid]
                before = output.finished
                output.extend(delta, self.engine.tokenizer)
                bar.update(output.finished and not before)
        return list(outputs.values())

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, Delta]]:
        """Yield ``(position of the prompt, Delta)`` as tokens come. Closing the iterator aborts what is left."""
        outputs = self._submit(prompts, sampling_params)
        position = {uid: place for place, uid in enumerate(outputs)}
        try:
            for delta in self._deltas(outputs):
                outputs[delta.uid].extend(delta)
                yield position[delta.uid], delta
        finally:
            for uid in outputs:
                self.engine.abort(uid)

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
        params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=top_k)
        outputs = self._submit([list(token_ids)], params)
        rows = [row for delta in self._deltas(outputs) for row in delta.prompt_logprobs]
        first: list[float | None] = [None]
        return Scores(list(token_ids), first + [row.logprob for row in rows], [[], *(list(row.top) for row in rows)])

    def _submit(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> dict[int, RequestOutput]:
        """Queue prompts; their empty outputs by uid. None is queued if one is refused."""
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many: list[Any] = [prompts] if single else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(many)
        else:
            each = list(params)
        if len(each) != len(many):
            raise InvalidRequest(
                f"{len(many)} prompts came with {len(each)} sampling parameters; give one, or one each."
            )
        outputs: dict[int, RequestOutput] = {}
        for place, (prompt, settings) in enumerate(zip(many, each, strict=True)):
            try:
                uid = self.engine.add(prompt, settings)
            except Error as error:
                for queued in outputs:
                    self.engine.abort(queued)
                raise type(error)(f"prompt {place}: {error}" if len(many) > 1 else str(error)) from error
            ids = list(self.engine.request(uid).prompt)
            samples = [CompletionOutput(index) for index in range(settings.n)]
            outputs[uid] = RequestOutput(str(uid), prompt if isinstance(prompt, str) else None, ids, samples)
        return outputs

    def _deltas(self, outputs: Mapping[int, RequestOutput]) -> Iterator[Delta]:
        """Turn the engine until these requests have ended."""
        left = sum(len(output.outputs) for output in outputs.values())
        while left:
            for delta in self.engine.step():
                if delta.uid in outputs:
                    left -= delta.finish_reason is not None
                    yield delta
        self.engine.require_alive()
