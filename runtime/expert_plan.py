"""Which experts are taken apart, and under which names: read off the model's own conversion mapping.

Transformers merges the experts of a file into parameters with three dimensions, and knows dense ones only. Where a file
holds quantized experts, or dense ones are quantized while they load, these parameters are taken apart instead
(:mod:`quant.experts`), in the meta model before planning and in the model that is loaded, and the merging is left out. No
list of models: names come from the rules that merge.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from quant.base import TensorSpec
from quant.experts import Projections, QuantExperts, inward_parameter, keeps_contract
from quant.linear import set_module
from runtime.accounting import DENSE_DTYPES
from runtime.checkpoint import Checkpoint
from runtime.errors import LoadError
from runtime.naming import Naming

STACKED = ("blocks", "scales")
"""Tensors of all experts in one, ``gate_up_proj_blocks`` and the like: gpt-oss' MXFP4."""

EXPERT = re.compile(r"\.(\d+)\.([^.]+)\.")
"""Number and projection in the name of an expert's tensor."""

SOURCE = re.compile(r".*experts\\?\.\*\\?\.(\w+)\\?\.weight")
"""A rule's pattern for one matrix of every expert."""


@dataclass(frozen=True)
class Stack:
    """A stored tensor of all experts in one. ``parts``: the names in the tree, along its first dimension. ``dense``: the parts
    are weights, ``transposed`` ones are ``[in, out]``; otherwise they are what a format stores."""

    parts: tuple[str, ...]
    dense: bool = False
    transposed: bool = False

    def part_of(self, spec: TensorSpec) -> TensorSpec:
        """What a part is, by the stack: a weight is ``[out, in]``, as its layer has it."""
        rest = spec.shape[1:]
        shape = (rest[::-1] if self.transposed else rest) if self.dense else (1, *rest)
        return TensorSpec(shape, spec.dtype)


@dataclass(frozen=True)
class ExpertPlan:
    """``modules``: every experts module that is taken apart. ``stacks``: tensors of all experts in one, by their names as
    renamed but without regard to the base model's prefix."""

    modules: Mapping[str, Projections] = field(default_factory=dict)
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def take_apart(self, model: nn.Module) -> None:
        """Replace the experts of a model, on the meta device, by linear layers of their own."""
        from transformers.initialization import no_init_weights

        with no_init_weights():  # thousands of linears draw random numbers, slow even on the meta device
            for name, projections in self.modules.items():
                set_module(model, name, QuantExperts(model.get_submodule(name), projections))

    def conversions(self, mapping: Iterable[Any]) -> list[Any]:
        """Transformers' conversions without those that merge these experts, and with those that split stacks."""
        from transformers.core_model_loading import Chunk, WeightConverter

        kept = [entry for entry in mapping if not isinstance(entry, WeightConverter) or not self._merges(entry)]
        splits = [
            WeightConverter(f"^{re.escape(name)}$", list(stack.parts), operations=[Chunk(dim=0)])
            for name, stack in self.stacks.items()
        ]
        return kept + splits

    def stack(self, first: str) -> Stack | None:
        """The stack by the name of its first part, which is what Transformers calls it."""
        return next((stack for stack in self.stacks.values() if stack.parts[0] == first), None)

    @property
    def transposed(self) -> frozenset[str]:
        """The layers whose dense weight is stored ``[in, out]``."""
        parts = (part for stack in self.stacks.values() if stack.transposed for part in stack.parts)
        return frozenset(part.removesuffix(".weight") for part in parts)

    def layer_of(self, tensor: str) -> str | None:
        """The expert's linear layer that a tensor of the tree belongs to."""
        for found in EXPERT.finditer(tensor):
            projections = self.modules.get(tensor[: found.start()])
            if projections and found[2] in projections.names:
                return tensor[: found.end() - 1]
        return None

    def _merges(self, converter: Any) -> bool:
        return any(
            converter.rename_source_key(f"{module}.0.{name}.weight")[1] is not None
            for module, projections in self.modules.items()
            for name in projections.names
        )


def plan_experts(checkpoint: Checkpoint, model: nn.Module, on_load: bool = False) -> ExpertPlan:
    """What to take apart in ``model`` (on the meta device): experts that are stored quantized, or, with ``on_load``, all, to be
    quantized while they load.

    Raises :class:`LoadError` for experts in a layout that is not known.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    owners = {name: module for name, module in model.named_modules() if _owns_stacked_matrices(module)}
    if not owners or not (on_load or checkpoint.quantization):
        return ExpertPlan()
    mapping = get_model_conversion_mapping(model)
    naming = Naming(model, (entry for entry in mapping if isinstance(entry, WeightRenaming)))
    single = {name: found for name, module in owners.items() if (found := _projections(name, module, mapping))}
    plan = _dense_experts if on_load else _quantized_experts
    return plan(checkpoint, naming, owners, single)


def _quantized_experts(
    checkpoint: Checkpoint, naming: Naming, owners: Mapping[str, nn.Module], single: Mapping[str, Projections]
) -> ExpertPlan:
    one_by_one = False
    modules: dict[str, Projections] = {}
    stacks: dict[str, Stack] = {}
    for stored, spec in checkpoint.tensors.items():
        if spec.dtype in DENSE_DTYPES:  # every quantized matrix has a tensor of another kind
            continue
        owner, local = _split(naming.rename(stored)[0], owners)
        if owner is None:
            continue
        module, expert = owners[owner], EXPERT.match(f".{local}")
        parameter, _, part = local.rpartition("_")
        if expert and owner in single and expert[2] in single[owner].names:
            one_by_one = True
        elif part in STACKED and keeps_contract(module) and parameter in (inward_parameter(module), "down_proj"):
            modules[owner] = Projections((inward_parameter(module),), "down_proj")
            parts = _parts(stored, spec, f"{owner}.{{}}.{parameter}.{part}", module)
            stacks[naming.before_prefix(stored)] = Stack(parts)
        else:
            raise _refusal(stored, spec, owner, module, single.get(owner))
    # Transformers' rules merge the experts of all layers or of none.
    return ExpertPlan(modules | (dict(single) if one_by_one else {}), stacks)


def _dense_experts(
    checkpoint: Checkpoint, naming: Naming, owners: Mapping[str, nn.Module], single: Mapping[str, Projections]
) -> ExpertPlan:
    modules: dict[str, Projections] = {}
    stacks: dict[str, Stack] = {}
    for stored, spec in checkpoint.tensors.items():
        owner, local = _split(naming.rename(stored)[0], owners)
        if owner is None:
            continue
        module, expert = owners[owner], EXPERT.match(f".{local}")
        if expert and owner in single and expert[2] in single[owner].names:
            modules[owner] = single[owner]
        elif keeps_contract(module) and local in (inward_parameter(module), "down_proj") and len(spec.shape) == 3:
            modules[owner] = Projections((inward_parameter(module),), "down_proj")
            parts = _parts(stored, spec, f"{owner}.{{}}.{local}.weight", module)
            stacks[naming.before_prefix(stored)] = Stack(parts, dense=True, transposed=bool(module.is_transposed))
    for name, module in owners.items():
        if name not in modules and "expert" in f"{name} {type(module).__name__}".lower():
            raise LoadError(
                f"{name} ({type(module).__name__}) are experts in a layout that cannot be quantized while loading: they are "
                "stored neither one by one nor in one tensor a projection. Load the model without --quantization, or "
                "take a copy whose experts are quantized each by itself."
            )
    return ExpertPlan(modules, stacks)


def _owns_stacked_matrices(module: nn.Module) -> bool:
    stacked = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    return stacked and not isinstance(module, nn.Conv1d)


def _split(name: str, owners: Mapping[str, nn.Module]) -> tuple[str | None, str]:
    """The experts module that a tensor lies in, and the rest of its name."""
    for dot in re.finditer(r"\.", name):
        if name[: dot.start()] in owners:
            return name[: dot.start()], name[dot.end() :]
    return None, name


def _projections(name: str, experts: nn.Module, mapping: Iterable[Any]) -> Projections | None:
    """The names of an expert's own layers in a file, by the rules that merge them; ``None`` if none do, or otherwise."""
    if not keeps_contract(experts) or experts.is_transposed or not experts.is_concatenated:
        return None
    inward = _merged_names(f"{name}.{inward_parameter(experts)}", mapping)
    outward = _merged_names(f"{name}.down_proj", mapping)
    if len(outward) != 1 or len(inward) != (2 if experts.has_gate else 1):
        return None
    return Projections(tuple(inward), outward[0])


def _merged_names(parameter: str, mapping: Iterable[Any]) -> list[str]:
    """``["w1", "w3"]``, if the matrices of these names of every expert are stacked and joined to become ``parameter``."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    module = parameter.rpartition(".")[0]
    for rule in (entry for entry in mapping if isinstance(entry, WeightConverter)):
        names = [found[1] for source in rule.source_patterns if (found := SOURCE.fullmatch(source))]
        stacks = isinstance(rule.operations[0], MergeModulelist) and rule.operations[0].dim == 0
        joins = all(isinstance(step, Concatenate) and step.dim == 1 for step in rule.operations[1:])
        made = {rule.rename_source_key(f"{module}.0.{name}.weight")[0] for name in names}
        if made == {parameter} and stacks and joins and len(names) == len(rule.source_patterns):
            return names
    return []


def _parts(stored: str, spec: TensorSpec, pattern: str, experts: Any) -> tuple[str, ...]:
    count = experts.down_proj.shape[0]
    if spec.shape[:1] != (count,):
        raise LoadError(f"{stored} is {spec}, but the model has {count} experts. The checkpoint is of another model.")
    return tuple(pattern.format(expert) for expert in range(count))


def _refusal(stored: str, spec: TensorSpec, owner: str, experts: nn.Module, known: Projections | None) -> LoadError:
    names = [f"{owner}.N.{name}" for name in known.names] if known else []
    if keeps_contract(experts):
        names += [f"{owner}.{inward_parameter(experts)}_blocks and _scales", f"{owner}.down_proj_blocks and _scales"]
    readable = f"What is read: {', '.join(names)}." if names else "No layout of these experts is read."
    return LoadError(
        f"{stored} is {spec}: experts ({owner}, {type(experts).__name__}) are stored quantized in a layout that is not "
        f"supported. {readable} Use a copy of the model whose experts are dense, or quantized each by itself."
    )
