"""The seam to Transformers: attention of an unmodified model arrives here, one call after another.

Importing this module registers one attention function under the plain word :data:`NAME` and no mask function, so that a
model built with ``attn_implementation=NAME`` makes no mask and hands every layer's queries, keys and values to
:func:`attention`. What happens to them depends on the forward that is under way, which travels in a context variable
because some models drop keyword arguments on their way down:

* inside :func:`forward_batch` they go to a backend. Calls are numbered in the order in which they come, and each must
  be what was recorded under its number;
* inside :func:`read_specs` and :func:`record_specs` they are recorded;
* anywhere else they are an error.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from attention import latent, mixers
from attention.base import AttentionBackend, AttentionBatch, AttentionError, AttentionSpec, UnsupportedAttention
from attention.call import Call, Forward, Original
from attention.checks import explain, layers_left_out, require_calls, require_known_states, require_positions
from attention.inputs import SharedInputs
from attention.intercept import intercept, intercepted
from attention.kv_cache import KVCache
from attention.positions import depends_on_length, rotate
from attention.recording import MaskedRecording, Recording, without_data
from attention.serving import Serving
from attention.states import MixerSpec, Segment, StateCache
from attention.time_steps import bound_time_steps

NAME = "relinear"  # Transformers reads a meaning into names with "flash", "sdpa", "paged|" or a slash

_current: ContextVar[Forward | None] = ContextVar("attention_forward", default=None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that Transformers calls: [1, T, H, Dv], and no attention weights."""
    forward = _current.get()
    if forward is None:
        raise AttentionError(
            "this model was loaded for the engine's paged attention and cannot be called by itself; "
            "to call it, load it with load_model(..., attn_implementation='sdpa')"
        )
    call = Call(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    if (refusal := call.refusal()) is not None:
        raise UnsupportedAttention(f"{forward.describe(module)}: {refusal}")
    return forward.attend(call), None


AttentionInterface.register(NAME, attention)


@contextmanager
def forward_batch(
    batch: AttentionBatch | Sequence[AttentionBatch],
    cache: KVCache,
    backend: AttentionBackend,
    specs: Sequence[AttentionSpec],
    states: StateCache | None = None,
    segments: Sequence[Segment] = (),
    lengths: Sequence[int] = (),
) -> Iterator[None]:
    """Let ``backend`` answer the attention calls of one packed forward of the model whose ``specs`` were recorded.

    Where the cache's calls are in several groups (:mod:`attention.layout`), ``batch`` is one for each, which differ in their
    blocks.
    A model with recurrent layers, prepared by :func:`prepare`, keeps their ``states`` of the sequences in the
    slots that ``segments`` name, in the order of the batch. ``lengths``, if given, are those of the sequence of each token
    [T], for rotary embeddings prepared by :func:`separate_lengths`; 0: no longer than what needs no care.
    """
    batches = [batch] if isinstance(batch, AttentionBatch) else batch
    assert len(batches) == len(cache.layout.reaches)
    forward = Serving(batches, cache, backend, specs, states, segments, lengths)
    with _under_way(forward):
        yield
    if forward.calls != len(specs):
        raise AttentionError(f"this forward made {forward.calls} attention calls, the recorded one {len(specs)}")


def _mix(module: nn.Module, forward: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    under_way = _current.get()
    return forward(*args, **kwargs) if under_way is None else under_way.mix(module, forward, args, kwargs)


def _expand(module: nn.Module, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    under_way = _current.get()
    return original(*args, **kwargs) if under_way is None else under_way.expand(module, original, *args, **kwargs)


def prepare(model: nn.Module) -> None:
    """Let the recurrent layers of a loaded model, if there are any, keep each sequence's states apart, and those with latent
    attention hand over their latents."""
    mixing = list(filter(mixers.keeps_state, model.modules()))
    intercept(mixing, "forward", _mix)
    for mixer in mixing:
        bound_time_steps(mixer)
    intercept(filter(latent.may_expand, model.modules()), latent.METHOD, _expand)


@contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """:func:`prepare` for a while."""
    mixing, expanding = (filter(kind, model.modules()) for kind in (mixers.keeps_state, latent.may_expand))
    with intercepted(mixing, "forward", _mix), intercepted(expanding, latent.METHOD, _expand):
        yield


def _rotate(module: nn.Module, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    under_way = _current.get()
    if isinstance(under_way, Serving) and under_way.lengths:
        return rotate(module, original, args, kwargs, under_way.lengths)
    return original(*args, **kwargs)


def separate_lengths(model: nn.Module) -> bool:
    """Let the rotary embeddings of a loaded model take each sequence's own length; ``False``: they are of unknown kind."""
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]  # as those of Transformers have
    intercept(filter(depends_on_length, rotary), "forward", _rotate)
    return bool(rotary)


class Layers(NamedTuple):
    """What a forward of a model calls: ``attention`` in call order and the names of the modules that are its ``callers``, the
    ``mixers`` that keep recurrent states, and which linear layers are ``siblings``, given the same input."""

    attention: list[AttentionSpec]
    callers: list[str]
    mixers: list[MixerSpec]
    siblings: list[tuple[str, ...]]

    @property
    def absorbed(self) -> list[str]:
        """Names of the linear layers that latent attention multiplies by itself, so that their weights must be dense."""
        latents = [name for name, spec in zip(self.callers, self.attention, strict=True) if spec.latent]
        return [f"{name}.{latent.PROJECTION}" for name in latents]


def read_specs(config: PreTrainedConfig, trust_remote_code: bool = False) -> list[AttentionSpec]:
    """The attention of :func:`read_layers`, for models that have nothing else."""
    return attention_only(config.model_type, read_layers(config, trust_remote_code)).attention


def record_specs(model: PreTrainedModel) -> list[AttentionSpec]:
    """The attention of :func:`record_layers`, for models that have nothing else."""
    return attention_only(type(model).__name__, record_layers(model)).attention


def attention_only(kind: str, layers: Layers) -> Layers:
    """Raise :class:`UnsupportedAttention` if something else than attention remembers tokens."""
    if layers.mixers:
        raise UnsupportedAttention(f"{kind}: {len(layers.mixers)} of its layers keep a recurrent state")
    return layers


def read_layers(
    config: PreTrainedConfig,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    siblings: bool = False,
) -> Layers:
    """What every layer of the causal LM that ``config`` describes asks for, in call order; its ``siblings`` only if they are
    asked for. No weight is read."""
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # how weights are stored does not concern attention
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=NAME, trust_remote_code=trust_remote_code, dtype=dtype
            )
    except Exception as error:
        reason = f"no causal language model can be built from its config ({type(error).__name__}: {error})"
        if isinstance(error, KeyError) and error.args == (NAME,):
            reason = "its attention has classes of its own and cannot be exchanged through Transformers' interface"
        raise UnsupportedAttention(f"{config.model_type}: {reason}") from error
    return record_layers(model, siblings)


def record_layers(model: PreTrainedModel, siblings: bool = False) -> Layers:
    """The same for a model that was built with ``attn_implementation=NAME``, which is left as it was."""
    plain, masked = Recording(model), MaskedRecording(model)
    with _recording_lock, _explained(model), without_data(model), _prepared(model):
        text = model.config.get_text_config(decoder=True)
        cache = DynamicCache(config=text)
        if not any(map(mixers.keeps_state, model.modules())):
            require_positions(model)
        with layers_left_out(model, text.num_hidden_layers) as left_out:
            _run(model, plain, use_cache=False)
        require_calls(model, plain, cache, text.num_hidden_layers, len(left_out))
        if not plain.specs:
            return Layers(
                [], [], plain.mixers, _siblings(model) if siblings else []
            )  # no mask, no position: nothing more to know
        require_positions(model)
        # MiniMax has a cache of its own: models with mixers make theirs.
        theirs = bool(plain.mixers) or "past_key_values" not in inspect.signature(model.forward).parameters
        with _meaningful_masks():
            _run(model, masked, use_cache=True, past_key_values=None if theirs else cache)
        require_known_states(cache, plain.mixers)  # layers may have joined
        if [replace(spec, window=None, chunk=None) for spec in masked.specs] != plain.specs:
            raise UnsupportedAttention("it attends differently with a cache of Transformers than without one")
        found = _siblings(model) if siblings else []
    return Layers(masked.specs, masked.callers, plain.mixers, found)


def _siblings(model: PreTrainedModel) -> list[tuple[str, ...]]:
    inputs = SharedInputs(model)
    try:
        with inputs.watched():
            _run(model, Recording(model), use_cache=False)
    except Exception:  # a first forward passed: its code cannot take slices, of which it may make no view
        return []
    return inputs.siblings


_TOKENS = 7  # of a recording: enough to be a prefill, and no likely number of anything else
_recording_lock = threading.Lock()  # a mask function is registered for the whole process


def _run(model: PreTrainedModel, recording: Recording, **options: Any) -> None:
    tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device=model.device)
    if model._supports_logits_to_keep():  # as the engine asks; with a number, Gemma 4 cuts rows off in the middle
        options["logits_to_keep"] = torch.zeros(1, dtype=torch.long, device=model.device)
    # No inference mode, whose tensors do not know that they were changed
    with _under_way(recording), recording.ranges, torch.inference_mode(False), torch.no_grad():
        model(tokens, position_ids=torch.zeros_like(tokens), **options)


@contextmanager
def _explained(model: PreTrainedModel) -> Iterator[None]:
    """Say which model is refused, and turn whatever fails in it without data into a refusal."""
    kind = type(model).__name__
    try:
        yield
    except UnsupportedAttention as error:
        raise UnsupportedAttention(f"{kind}: {error}") from error
    except Exception as error:
        raise UnsupportedAttention(f"{kind}: {explain(model, error)}") from error


@contextmanager
def _under_way(forward: Forward) -> Iterator[None]:
    token = _current.set(forward)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def _meaningful_masks() -> Iterator[None]:
    """Let masked recordings make the masks of models of ours; every other forward still gets none."""

    def mask(**kwargs: Any) -> Tensor | None:
        recording = _current.get()
        if not isinstance(recording, MaskedRecording):
            return None
        return recording.mask(
            kwargs["mask_function"],
            kwargs.get("local_size"),
            chunk=getattr(kwargs["config"], "attention_chunk_size", None),
            overlaid=kwargs["use_vmap"],
        )

    AttentionMaskInterface.register(NAME, mask)
    try:
        yield
    finally:
        AttentionMaskInterface._global_mapping.pop(NAME)
