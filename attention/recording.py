"""Forwards without data, which tell what a model's attention computes before any weight is read.

The model runs twice on the meta device, its calls answered with tensors that hold nothing. :class:`Recording` is the
forward that the engine will run: no mask, no cache. :class:`MaskedRecording` is one with a throw-away cache and with
masks that only carry their meaning: it shows what each layer may see, which the attention function is not always told.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attention import latent, mixers
from attention.base import AttentionSpec, Reach, UnsupportedAttention
from attention.call import Call, Forward, Original
from attention.positions import depends_on_length, tempers_rows
from attention.states import MixerSpec


class Recording(Forward):
    """Writes down every call; there must be no mask."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.specs: list[AttentionSpec] = []
        self.callers: list[str] = []
        self.mixers: list[MixerSpec] = []
        self.mixing: nn.Module | None = None
        self.handed: list[tuple[Tensor, Tensor, int, int]] = []  # keys and values by call, and their versions
        self.expanded: dict[nn.Module, latent.Expanded] = {}
        self.tried: dict[latent.Sizes, bool] = {}
        self.ranges = WatchRanges()

    def describe(self, module: nn.Module) -> str:
        return f"{self.names[module]} ({type(module).__name__})"

    def attend(self, call: Call) -> Tensor:
        tokens = call.q.shape[2]
        if self.mixing is not None:
            self.refuse(call, "it attends inside of a layer that keeps a recurrent state")
        if self.ranges.made_by(call.module, tokens) and not tempers_rows(call.module):
            self.refuse(call, "it numbers the tokens of a forward by itself, which packed sequences make wrong")
        self.ranges.made.clear()
        spec = call.spec(*self.reach(call))
        if (expanded := self.expanded.pop(call.module, None)) is not None:
            spec = expanded.spec(call, spec)
        self.specs.append(replace(spec, shares=self.source_of(call)))
        self.callers.append(self.names[call.module])
        return call.v.new_empty(1, tokens, call.q.shape[1], call.v.shape[3])

    def source_of(self, call: Call) -> int | None:
        """The earlier call that handed over the very keys and values of ``call``, unchanged since."""
        now = (call.k, call.v, call.k._version, call.v._version)
        self.handed.append(now)
        for source, (k, v, *versions) in enumerate(self.handed[:-1]):
            if k is call.k and v is call.v and versions == [*now[2:]]:
                if self.specs[source].latent:
                    self.refuse(call, "it attends to keys and values that another layer expanded")
                return source
        return None

    def expand(self, module: nn.Module, original: Original, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = original(latents, rotated)
        found = latent.recognise(module, latents, rotated, keys, values, self.tried)
        if found is not None:
            self.expanded[module] = found
        return keys, values

    def mix(self, module: nn.Module, forward: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.mixing = module
        spec, out = mixers.record(self.names[module], forward, args, kwargs)
        self.mixing = None
        self.mixers.append(spec)
        return out

    def reach(self, call: Call) -> Reach:
        if call.mask is not None:
            self.refuse(call, "it brings an attention mask of its own")
        return Reach()

    def refuse(self, call: Call, reason: str) -> NoReturn:
        raise UnsupportedAttention(f"{self.describe(call.module)}: {reason}")


class MaskedRecording(Recording):
    """Makes the masks of a forward and knows them again when a call brings one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.masks: list[tuple[Tensor, Reach | None]] = []

    def mask(
        self, mask_function: Callable[..., Any], local_size: int | None, chunk: int | None, overlaid: bool
    ) -> Tensor:
        """An empty mask that stands for ``mask_function`` of a window, or a chunk if it is ``chunk``, of local_size."""
        reach: Reach | None = Reach(window=local_size)
        if local_size is not None and local_size == chunk:
            reach = Reach(chunk=chunk)
        elif overlaid or not _is_causal(mask_function, local_size):
            reach = None
        self.masks.append((torch.empty(1, 1, 1, 1, device="meta"), reach))
        return self.masks[-1][0]

    def reach(self, call: Call) -> Reach:
        if call.mask is None and not self.masks:  # code that leaves masks to the attention function altogether
            return Reach(window=call.options.get("sliding_window"))
        made = [reach for mask, reach in self.masks if mask is call.mask]
        if not made:
            self.refuse(call, "it makes or changes its attention mask by itself, so what it may see is unknown")
        if (reach := made[0]) is None:
            self.refuse(call, "its attention mask is neither causal nor a causal window")
        if (told := call.options.get("sliding_window", reach.window)) != reach.window:
            self.refuse(call, f"it is told a window of {told}, but its mask has {reach.window}")
        return reach


class WatchRanges(TorchFunctionMode):
    """Remembers who called ``torch.arange``, and how long the range was."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[CodeType, int]] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.arange:
            self.made.add((sys._getframe(1).f_code, result.numel()))
        return result

    def made_by(self, module: nn.Module, length: int) -> bool:
        return (inspect.unwrap(type(module).forward).__code__, length) in self.made


def _is_causal(mask_function: Callable[..., Any], window: int | None) -> bool:
    """Whether ``mask_function(batch, head, q, kv)`` shows the keys ``q - window < kv <= q``, tried where it matters."""

    def shows(query: int, key: int) -> bool:
        return bool(mask_function(*(torch.tensor(index) for index in (0, 0, query, key))))

    far = window if window is not None else 1 << 20
    try:
        return not shows(0, 1) and shows(far, 1) and shows(far, far) and shows(far, 0) == (window is None)
    except NotImplementedError:  # it asks the meta device which tokens are of an image; of text, none are
        return True


def _first_expert(gate: Any, hidden: Tensor) -> tuple[Any, ...]:
    """The answer of JetMoE's gate to rows [n, H], as if it sent all of them to its first expert."""
    rows = hidden.shape[0] * gate.top_k
    index = torch.zeros(rows, dtype=torch.long, device=hidden.device)
    sizes = [rows] + [0] * (gate.num_experts - 1)
    return index, index, hidden.new_empty(rows), sizes, hidden.new_empty(hidden.shape[0], gate.num_experts)


_PADDING_CHECK = "warn_if_padding_and_no_attention_mask"


@contextmanager
def without_data(model: nn.Module) -> Iterator[None]:
    """For the time of a recording, let no part of ``model`` depend on values: the meta device has none."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    stubs: list[tuple[nn.Module, str, Callable[..., Any]]] = []
    for module in modules:
        kind = type(module).__name__
        if kind == "JetMoeTopKGating":  # counts its tokens on the host, and attention heads are among its experts
            stubs.append((module, "forward", partial(_first_expert, module)))
        elif (
            kind.endswith("Experts") and kind != "JetMoeParallelExperts"
        ):  # they count their tokens on the host; attention does not care
            stubs.append((module, "forward", lambda hidden, *args, **kwargs: hidden))
        if hasattr(module, _PADDING_CHECK):  # looks for padding tokens in the input
            stubs.append((module, _PADDING_CHECK, lambda *args, **kwargs: None))
    rotary: list[tuple[Any, Any]] = []
    for module in modules:  # some rotary embeddings ask for the largest position and change their frequencies
        if depends_on_length(module):
            rotary.append((module, module.rope_type))
    try:
        model.eval()
        for module, name, stub in stubs:
            module.__dict__[name] = stub
        for module, rope_type in rotary:
            module.rope_type = dict.fromkeys(rope_type, "default") if isinstance(rope_type, dict) else "default"
        yield
    finally:
        for module, was_training in zip(modules, training, strict=True):
            module.training = was_training
        for module, name, _ in stubs:
            del module.__dict__[name]
        for module, rope_type in rotary:
            module.rope_type = rope_type
