"""From the names of a file to the names of the model's tree, by Transformers' own rules, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from quant.base import TensorSpec
from runtime.checkpoint import Checkpoint

if TYPE_CHECKING:
    from runtime.expert_plan import ExpertPlan


@dataclass(frozen=True)
class Headers:
    """``tensors``: what is stored, under the names of the model's tree. ``converted``: stored names that Transformers makes
    other parameters of -> their names: one, which it stacks of several (each expert's matrix, say), or several that it
    cuts one into. ``sources``: the name in the model's
    tree -> the name in the file; ``places``: of parts of a stored stack, their place along its first dimension.
    ``written``: linear layers of experts -> their names in the file, where they differ; ``aliases``: the tensors of these
    layers by their names in the file."""

    tensors: Mapping[str, TensorSpec]
    converted: Mapping[str, tuple[str, ...]]
    sources: Mapping[str, str]
    places: Mapping[str, int]
    written: Mapping[str, str]
    aliases: Mapping[str, TensorSpec]


class Naming:
    """Transformers' conversions of names for one model, whose tree may be taken apart already."""

    def __init__(self, model: nn.Module, mapping: Iterable[Any]):
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        entries = list(mapping)
        self._renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
        self._prefix, self._state = str(model.base_model_prefix), model.state_dict()
        self._modules = {name for name, _ in model.named_modules()}

    def before_prefix(self, stored: str) -> str:
        """The name as renamed, but for the base model's prefix that the tree may have in front and the file has not."""
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(stored, self._renamings, [])[0])

    def rename(self, stored: str) -> tuple[str, tuple[str, ...]]:
        """The name in the tree, and the tensors that a converter makes from this one, perhaps among others; it may be none."""
        from transformers.core_model_loading import rename_source_key

        name, converted = rename_source_key(stored, self._renamings, self._converters, self._prefix, self._state)
        # Transformers adds or strips the base prefix only for names of the state dict, where qweight and the like are not.
        return (name, self._targets(name, converted)) if converted is not None else (self._in_tree(name), ())

    def _targets(self, first: str, pattern: str) -> tuple[str, ...]:
        """What the converter of ``pattern`` makes, of which ``first`` is the name of the first."""
        converter = next(entry for entry in self._converters if pattern in entry.source_patterns)
        known, *others = converter.target_patterns
        return (first, *(first.replace(known, other) for other in others if known in first))

    def _in_tree(self, name: str) -> str:
        """The name with the base prefix that its module has in the tree. What follows the module may have dots of its own:
        bitsandbytes stores ``weight.absmax``."""
        prefix = self._prefix
        for place in (place for place in reversed(range(len(name))) if name[place] == "."):
            module, local = name[:place], name[place + 1 :]
            for candidate in (module, f"{prefix}.{module}", module.removeprefix(f"{prefix}.")):
                if candidate in self._modules:
                    return f"{candidate}.{local}" if candidate else local
        return name


def rename_headers(checkpoint: Checkpoint, model: nn.Module, experts: ExpertPlan) -> Headers:
    """The stored tensors under the names that they will have in ``model`` (on the meta device, its experts taken apart as
    planned, nothing swapped yet)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    naming = Naming(model, experts.conversions(get_model_conversion_mapping(model)))
    tensors: dict[str, TensorSpec] = {}
    converted: dict[str, tuple[str, ...]] = {}
    sources: dict[str, str] = {}
    places: dict[str, int] = {}
    written: dict[str, str] = {}
    aliases: dict[str, TensorSpec] = {}
    for stored, spec in checkpoint.tensors.items():
        name, targets = naming.rename(stored)
        if stack := experts.stack(name):
            tensors |= dict.fromkeys(stack.parts, stack.part_of(spec))
            sources |= dict.fromkeys(stack.parts, stored)
            places |= {part: place for place, part in enumerate(stack.parts)}
        elif targets:
            converted[stored] = targets
        else:
            tensors[name], sources[name] = spec, stored
            if (layer := experts.layer_of(name)) and not stored.startswith(layer):
                written[layer] = stored.removesuffix(name.removeprefix(layer))
                aliases[stored] = spec
    return Headers(tensors, converted, sources, places, written, aliases)
