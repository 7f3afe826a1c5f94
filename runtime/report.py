"""What people read: the start-up report and the inspection table, and the same facts as plain data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from attention.registry import Selection
from attention.states import bytes_per_sequence
from runtime.errors import some
from runtime.memory import CacheSize, format_bytes

if TYPE_CHECKING:
    from attention.hf import Layers
    from attention.layout import CacheLayout
    from runtime.linear_plan import ModulePlan
    from runtime.loader import LoadedModel
    from runtime.plan import LoadPlan


def load_report(loaded: LoadedModel) -> str:
    """Format, bits, group, kernel and why, bytes against bf16, one aligned line each."""
    plan = loaded.plan
    lines = plan_lines(plan)
    peak = f"{loaded.seconds:.1f} s, peak resident {format_bytes(loaded.peak_rss)}"
    if loaded.peak_growth is not None:
        predicted = f", {format_bytes(plan.peak_bytes)} predicted" if plan.on_load else ""
        peak += f"; loading took {format_bytes(loaded.peak_growth)} at its peak, without pages of files{predicted}"
    lines.append(("load", peak))
    return aligned(lines)


def engine_report(
    loaded: LoadedModel,
    layers: Layers,
    selection: Selection,
    size: CacheSize,
    layout: CacheLayout,
    stored_as: str,
    graphs: str,
    settled: Sequence[tuple[str, str]] = (),
) -> str:
    """The load report, with attention, the KV cache, what is said of graphs, and what was ``settled``
    after loading."""
    bounded = sum(reach.bounded for reach in layout.reaches)
    windows = f"; {bounded} of {size.groups} groups of layers free the blocks behind their window" if bounded else ""
    token_bytes = size.nbytes // (size.blocks * size.block_size) * size.groups
    lines = [
        *attention_lines(layers, selection),
        (
            "kv cache",
            f"{size.tokens} tokens ({format_bytes(size.nbytes)}, {format_bytes(token_bytes)} a token, "
            f"{size.blocks} blocks of {size.block_size}) in {stored_as}; room for "
            f"{size.sequences:.1f} sequences of {size.max_model_len}{windows}",
        ),
        ("graphs", graphs),
        *settled,
    ]
    return load_report(loaded) + "\n" + aligned(lines)


def plan_lines(plan: LoadPlan) -> list[tuple[str, str]]:
    """Label and text of what is known before loading."""
    weights, bf16 = plan.weight_bytes, plan.bf16_bytes
    saved = f", {100 * weights / bf16:.0f} % of the {format_bytes(bf16)} in bf16" if plan.quantized else ""
    dtype = _dtype(plan.dtype) + (f" ({plan.dtype_note})" if plan.dtype_note else "")
    source = plan.checkpoint.quantization_source or "the checkpoint is dense"
    lines = [
        ("model", f"{plan.checkpoint.name} ({plan.config.model_type}), {dtype} on {plan.device}"),
        (
            "format",
            f"{plan.method.summary} ({source})" if plan.method else "not quantized",
        ),
        ("weights", f"{format_bytes(weights)}{saved}"),
    ]
    for (kernel, reason), count in Counter((m.kernel, m.reason) for m in plan.quantized).items():
        lines.append(("kernel", f"{kernel} for {count} linear layers ({reason})"))
    lines += _input_lines(plan)
    lines += [("remark", remark) for remark in plan.remarks]
    if plan.unmatched:
        count = len(plan.unmatched)
        lines.append(("unmatched", f"{count} entries of the configuration name no module: {some(plan.unmatched)}"))
    for why, count in Counter(plan.account.ignored.values()).items():
        lines.append(("ignored", f"{count} stored tensors: {why}"))
    for reason, names in _dense(plan).items():
        lines.append(("dense", f"{_collapse(names)}: {reason}"))
    return lines


def attention_lines(layers: Layers, selection: Selection) -> list[tuple[str, str]]:
    """Label and text of what attends to what, and through which backend; of recurrent layers, what they keep."""
    lines = []
    if layers.attention:
        why = "".join(f"; {name} refused: {reason}" for name, reason in selection.refusals.items())
        kinds = Counter(str(spec) for spec in layers.attention)
        shapes = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
        lines.append(("attention", f"{selection.backend.summary}{why}: {shapes}"))
    if layers.mixers:
        whole = "" if all(mixer.continues for mixer in layers.mixers) else "; prompts are computed in one piece"
        lines.append(
            (
                "states",
                f"{len(layers.mixers)} recurrent layers keep {format_bytes(bytes_per_sequence(layers.mixers))} a "
                f"sequence; prefixes are not shared{whole}",
            )
        )
    return lines


def inspect_text(plan: LoadPlan, attention: Sequence[tuple[str, str]]) -> str:
    """The whole inspection as text; layers that differ only in their numbers share a row."""
    rows = [("module", "format", "bits", "group", "kernel", "bytes", "why")]
    groups: dict[tuple[Any, ...], list[ModulePlan]] = {}
    for module in plan.modules.values():
        key = (re.sub(r"\d+", "N", module.name), module.shape, module.scheme, module.kernel, module.reason)
        groups.setdefault(key, []).append(module)
    for (_, _, scheme, kernel, reason), modules in groups.items():
        name = f"{_collapse([m.name for m in modules])} {modules[0].shape}"
        bits = str(scheme.kind.bits) if scheme else str(8 * plan.dtype.itemsize)
        kind = _format(plan, modules[0])
        size = format_bytes(sum(m.nbytes for m in modules))
        rows.append((name, kind, bits, str(scheme.group) if scheme else "-", kernel, size, reason))
    lines = [
        *plan_lines(plan)[:3],
        *_input_lines(plan),
        *(("remark", remark) for remark in plan.remarks),
        *attention,
        ("load peak", f"{format_bytes(plan.peak_bytes)} predicted"),
    ]
    account = plan.account
    lines += [("unmatched", f"{entry} names no module of this model") for entry in plan.unmatched]
    lines += [("ignored", f"{name}: {reason}") for name, reason in account.ignored.items()]
    lines += [("unclaimed", f"{name}: no module wants it; loading will refuse") for name in account.unclaimed]
    lines += [("missing", f"{name}: stored nowhere; loading will refuse") for name in account.missing]
    return aligned(lines) + "\n\n" + _table(rows)


def inspect_data(plan: LoadPlan, attention: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The whole inspection as JSON data, every module by itself."""
    return {
        "model": plan.checkpoint.name,
        "model_type": plan.config.model_type,
        "dtype": _dtype(plan.dtype),
        "device": str(plan.device),
        "quantization": plan.method.name if plan.method else None,
        "format": plan.method.summary if plan.method else None,
        "weight_bytes": plan.weight_bytes,
        "bf16_bytes": plan.bf16_bytes,
        "predicted_peak_bytes": plan.peak_bytes,
        "attention": dict(attention),
        "modules": [
            {
                "name": module.name,
                "format": _format(plan, module),
                "in_features": module.shape.in_features,
                "out_features": module.shape.out_features,
                "bits": module.scheme.kind.bits if module.scheme else 8 * plan.dtype.itemsize,
                "group": module.scheme.group if module.scheme else None,
                "kernel": module.kernel,
                "inputs": str(module.scheme.activation) if module.scheme and module.scheme.activation else None,
                "inputs_dropped": str(module.dropped) if module.dropped else None,
                "why": module.reason,
                "bytes": module.nbytes,
            }
            for module in plan.modules.values()
        ],
        "remarks": list(plan.remarks),
        "unmatched": list(plan.unmatched),
        "ignored": dict(plan.account.ignored),
        "unclaimed": list(plan.account.unclaimed),
        "missing": list(plan.account.missing),
    }


def _format(plan: LoadPlan, module: ModulePlan) -> str:
    method = module.rounding or plan.method
    return method.name if module.scheme and method else "dense"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _input_lines(plan: LoadPlan) -> list[tuple[str, str]]:
    """Which linear layers quantize their inputs, and which would if they were run as the checkpoint says."""
    lines = []
    says = "the method does" if plan.on_load else "the checkpoint says"
    for (executed, dropped, asked), count in Counter(
        (m.scheme.activation, m.dropped, m.asked) for m in plan.quantized if m.scheme
    ).items():
        if executed:
            source = "as --activation-quantization asks, not the checkpoint" if asked else f"as {says}"
            lines.append(("inputs", f"of {count} linear layers quantized, {source}: {executed}"))
        if dropped:
            lines.append(("inputs", f"of {count} linear layers left alone (weight only); {says}: {dropped}"))
    return lines


def _dense(plan: LoadPlan) -> dict[str, list[str]]:
    """Dense linear layers of a quantized checkpoint, by reason."""
    reasons: dict[str, list[str]] = {}
    for module in plan.modules.values():
        if plan.method and module.scheme is None:
            reasons.setdefault(module.reason, []).append(module.name)
    return reasons


def _collapse(names: Sequence[str]) -> str:
    """``a.0.b, a.1.b, a.2.b`` -> ``a.{0-2}.b``, every number by itself; several patterns are joined with commas."""
    shown = [tuple(re.split(r"(\d+)", name)) for name in dict.fromkeys(names)]  # text and number in turn
    for place in range(1, max(map(len, shown), default=0), 2):
        groups: dict[tuple[str, ...], list[str]] = {}
        for parts in shown:
            rest = (*parts[:place], "", *parts[place + 1 :])
            groups.setdefault(rest, []).extend(parts[place : place + 1])
        shown = [
            (*rest[:place], _numbers(found), *rest[place + 1 :]) if found else rest[:-1]
            for rest, found in groups.items()
        ]
    return ", ".join("".join(parts) for parts in shown)


def _numbers(found: Sequence[str]) -> str:
    """``0, 1, 2`` -> ``{0-2}``; one alone as it is."""
    numbers = [int(number) for number in found]
    if len(numbers) == 1:
        return found[0]
    if len(numbers) == max(numbers) - min(numbers) + 1:
        return f"{{{min(numbers)}-{max(numbers)}}}"
    return f"{{{','.join(found)}}}"


def aligned(lines: Sequence[tuple[str, str]]) -> str:
    """Labels and texts, one a line."""
    return "\n".join(f"{label:<10} {text}" for label, text in lines)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows)
