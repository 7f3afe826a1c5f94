"""What a recorded forward must have shown before its model is served: nothing that would be computed wrongly in silence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from attention.base import UnsupportedAttention
from attention.recording import Recording
from attention.states import MixerSpec

_KV_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
_STATE_LAYERS = {
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}


def require_known_states(cache: Any, recorded: Sequence[MixerSpec]) -> None:
    known = {state.key.layer for mixer in recorded for state in mixer.states}
    kinds = [(number, type(layer).__name__) for number, layer in enumerate(cache.layers)]
    states = [
        kind for number, kind in kinds if kind not in _KV_LAYERS and not (kind in _STATE_LAYERS and number in known)
    ]
    if states:
        # Transformers 5.17, whose caches lack this method, gives layers of an MLP or experts alone a state never used.
        old = not hasattr(cache, "get_conv_state")
        remedy = ". If these are layers of an MLP or experts alone, Transformers 5.23 serves them" if old else ""
        raise UnsupportedAttention(
            f"{len(states)} of its {len(cache.layers)} layers keep a state other than keys and values "
            f"({', '.join(sorted(set(states)))}), which is not kept per sequence by anything here{remedy}"
        )


def require_positions(model: nn.Module) -> None:
    models = [module for module in model.modules() if hasattr(module, "base_model_prefix")]  # PreTrainedModel
    if not any("position_ids" in inspect.signature(part.forward).parameters for part in models):
        raise UnsupportedAttention("it takes no position_ids, so packed sequences would share their positions")
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        raise UnsupportedAttention("its positions count from its padding index, not from 0")


@contextmanager
def layers_left_out(model: nn.Module, layers: int) -> Iterator[set[nn.Module]]:
    """The layers that a forward of text does not run, known when it has ended: cross-attention to images, say."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    ran: set[nn.Module] = set()
    left_out: set[nn.Module] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: ran.add(module)) for stack in stacks for layer in stack
    ]
    try:
        yield left_out
    finally:
        for hook in hooks:
            hook.remove()
    for stack in stacks:
        if ran & set(stack):
            left_out |= set(stack) - ran


REMOTE_CODE = (
    "The code is the checkpoint's own; it is served after two changes to it: (1) its attention calls "
    "ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](self, query, key, value, attention_mask, scaling=..., "
    "**kwargs), and its model hands **kwargs down to it; (2) its PreTrainedModel class says "
    "_supports_attention_backend = True"
)


def brought_by_checkpoint(model: nn.Module) -> bool:
    """Whether the code of a model came with its weights."""
    return type(model).__module__.startswith("transformers_modules.")


def advice(model: nn.Module) -> str:
    """What to change in code that a checkpoint brought; of Transformers' own models there is nothing to say."""
    return f". {REMOTE_CODE}" if brought_by_checkpoint(model) else ""


def explain(model: nn.Module, error: Exception) -> str:
    """Why a model whose forward fails without data cannot be served."""
    if any("Indexer" in type(module).__name__ for module in model.modules()):
        return "an indexer selects the keys that a query sees (sparse attention), which nothing here computes"
    if any(name.endswith("encoder_attn") for name, _ in model.named_modules()):
        return "its layers attend to what an encoder makes of an input that is no text (cross-attention)"
    failure = f"{type(error).__name__}: {error}"
    if "meta tensors" in str(error):
        return f"what it computes depends on the values of its input, so it cannot be known beforehand ({failure})"
    return f"a forward without data failed ({failure}){advice(model)}"


def require_calls(model: nn.Module, recording: Recording, cache: Any, layers: int, left_out: int) -> None:
    require_known_states(cache, recording.mixers)
    if not recording.specs and not recording.mixers:
        raise UnsupportedAttention(
            f"no layer calls the attention function: the model has attention of its own{advice(model)}"
        )
    without = sum(type(layer).__name__ == "DummyLayer" for layer in cache.layers)  # feed-forward layers, shared keys
    calls = len(recording.specs) + len(recording.mixers)
    if calls < layers - without - left_out:
        raise UnsupportedAttention(
            f"its {layers} layers call the attention function only {calls} times; "
            "layers that are recurrent or have attention of their own are not supported yet"
        )
