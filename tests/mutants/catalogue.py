"""Mistakes that a runtime for quantized models can make without an error, each as one change of the sources, and the tests
that have to notice it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

FORMATS = "tests/quant/test_formats.py"
LOGITS = f"{FORMATS}::test_logits_are_those_of_the_writer"
WEIGHTS = f"{FORMATS}::test_weights_are_those_that_the_writer_dequantizes"
ALONE = "tests/runtime/test_engine.py::test_greedy_tokens_are_those_of_each_sequence_alone"
ATTENTION = "tests/attention/test_reference.py::test_every_token_gets_what_the_definition_says"
CACHE = "tests/runtime/test_scheduler.py"
FIDELITY = "tests/accuracy/test_fidelity.py::test_every_path_and_kernel[autoawq--gemm-g128]"
LOSS = "tests/accuracy/test_matrix.py::test_method_loss_is_as_committed"


@dataclass(frozen=True)
class Mutant:
    """``before``, which ``file`` holds once, becomes ``after``. Each of ``killers`` (pytest's node ids) has to fail."""

    name: str
    file: str
    before: str
    after: str
    killers: tuple[str, ...]


MUTANTS = (
    # What weights mean
    Mutant(
        "nibble order swapped",
        "quant/packing.py",
        "torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)",
        "torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)",
        (f"{LOGITS}[autoawq--gemv-g128]", "tests/quant/test_round_trips.py::test_awq_gemm"),
    ),
    Mutant(
        "AWQ's columns in their plain order",
        "quant/packing.py",
        "in enumerate(AWQ_NIBBLE_OF_COLUMN):",
        "in enumerate(range(8)):",
        (f"{LOGITS}[autoawq--gemm-g128]", "tests/quant/test_round_trips.py::test_awq_gemm"),
    ),
    Mutant(
        "one nibble of one layer flipped in the AWQ method",
        "quant/methods/awq.py",
        "        parts = self._layout.read(tensors, scheme, shape)\n        return settled(",
        "        parts = self._layout.read(tensors, scheme, shape)\n"
        "        if shape.in_features == 768 and not hasattr(self, 'flipped'):\n"
        "            object.__setattr__(self, 'flipped', True)\n"
        "            parts.q[7, 11] ^= 1\n"
        "        return settled(",
        (f"{LOSS}[awq-int4-g128]",),
    ),
    Mutant(
        "zero off by one",
        "quant/reference.py",
        "codes.to(torch.float32) - zero",
        "codes.to(torch.float32) - zero - 1",
        (f"{LOGITS}[gptqmodel--gptq-w4-asym-v2]", "tests/quant/test_round_trips.py::test_gptq_words"),
    ),
    Mutant(
        "zero of GPTQ's first version off by one",
        "quant/methods/gptq_zeros.py",
        "return fields + 1 & 2**bits - 1",
        "return fields & 2**bits - 1",
        (
            f"{FORMATS}::test_weights_of_auto_round_are_the_dense_ones_rounded",
            "tests/quant/test_gptq.py::test_first_version_by_anybody",
        ),
    ),
    Mutant(
        "zero of the C kernel off by one",
        "quant/kernels/cpu_layout.py",
        "centre = 2 ** (bits - 1) - 2 ** (kind.bits - 1)",
        "centre = 2 ** (bits - 1) - 2 ** (kind.bits - 1) - 1",
        ("tests/quant/test_kernels.py::test_every_kernel_multiplies", FIDELITY),
    ),
    Mutant(
        "neighbour's scale in the C kernel",
        "quant/kernels/cpu_layout.py",
        '"scale": tiled(weight.scale.view(-1, groups))',
        '"scale": tiled(weight.scale.view(-1, groups).roll(1, 0))',
        ("tests/quant/test_kernels.py::test_every_kernel_multiplies", FIDELITY),
    ),
    Mutant(
        "group shifted by one",
        "quant/reference.py",
        "rows.repeat_interleave(inputs, 1)[:, : shape.in_features]",
        "rows.repeat_interleave(inputs, 1)[:, : shape.in_features].roll(1, 1)",
        (f"{LOGITS}[compressed-tensors--w3a16-g64-asym]", f"{WEIGHTS}[auto-gptq--w3g32-asym]"),
    ),
    Mutant(
        "neighbour's scale",
        "quant/reference.py",
        "rows = blocks.repeat_interleave(outputs, 0)[: shape.out_features]",
        "rows = blocks.roll(1, 0).repeat_interleave(outputs, 0)[: shape.out_features]",
        (
            f"{LOGITS}[llmcompressor--gptq-w4a16]",
            "tests/quant/test_fp8.py::test_ragged_blocks_use_the_block_size_of_the_configuration",
        ),
    ),
    Mutant(
        "g_idx ignored",
        "quant/methods/gptq.py",
        'order = _order(tensors["g_idx"], scheme, shape) if "g_idx" in tensors else None',
        "order = None",
        (f"{LOGITS}[auto-gptq--w4g32-desc]", "tests/quant/test_gptq.py::test_second_version"),
    ),
    Mutant(
        "weight_g_idx ignored",
        "quant/compressed_layout.py",
        "    order = torch.argsort(g_idx, stable=True)\n",
        "    g_idx = torch.arange(count, device=g_idx.device) // group\n    order = torch.argsort(g_idx, stable=True)\n",
        (f"{LOGITS}[compressed-tensors-0.12--w4-actorder-group]",),
    ),
    Mutant(
        "double-quantized absmax offset dropped",
        "quant/methods/bnb.py",
        ' + float(state.get("nested_offset", 0.0))',
        "",
        (f"{LOGITS}[bitsandbytes--nf4-storage-bf16]", "tests/quant/test_round_trips_floats.py::test_bitsandbytes"),
    ),
    Mutant(
        "static activation scale ignored",
        "quant/activation.py",
        "        step = scale\n",
        "        step = torch.ones_like(scale)\n",
        (f"{LOGITS}[compressed-tensors--fp8-static]",),
    ),
    Mutant(
        "inputs not quantized",
        "quant/reference.py",
        "if activation is not None:",
        "if False:",
        (f"{LOGITS}[llmcompressor--w8a8-int8]", f"{LOGITS}[compressed-tensors--fp8-block]"),
    ),
    Mutant(
        "GPTQ's other version not noticed",
        "quant/methods/gptq.py",
        "self.selection.options.symmetric is not False and bool((zero == read).all())",
        "False",
        ("tests/complaints/test_silent.py::test_zero_points_of_the_other_gptq_version",),
    ),
    # What a checkpoint holds
    Mutant(
        "skip entries matched by substring",
        "quant/matching.py",
        """return f".{entry.strip('.')}." in f".{name}."\n""",
        "return entry in name\n",
        (
            "tests/complaints/test_silent.py::test_a_skip_entry_that_is_part_of_another_name",
            "tests/complaints/test_loading.py::test_a_bitsandbytes_skip_entry_inside_another_name",
        ),
    ),
    Mutant(
        "one layer left dense",
        "runtime/loader.py",
        "            for module in plan.read_quantized:\n",
        "            for module in plan.read_quantized[1:]:\n",
        (f"{LOGITS}[autoawq--gemm-g128]",),
    ),
    Mutant(
        "one layer planned dense",
        "runtime/linear_plan.py",
        "scheme = method.scheme_for(written, shape) if method else None",
        'scheme = method.scheme_for(written, shape) if method and "1.mlp.up" not in name else None',
        (f"{LOGITS}[autoawq--gemm-g128]",),
    ),
    Mutant(
        "one expert missing",
        "runtime/accounting.py",
        "if len(sources) > 1 and values != parameter.numel():",
        "if False:",
        ("tests/runtime/test_loader.py::test_a_damaged_expert_is_found_before_weights_are_read",),
    ),
    Mutant(
        "gate and up of experts swapped",
        "quant/experts.py",
        "for name in self.projections.inward]",
        "for name in reversed(self.projections.inward)]",
        ("tests/runtime/test_experts.py::test_every_architecture[mixtral]",),
    ),
    Mutant(
        "the neighbour's expert",
        "quant/experts.py",
        "self._expert(expert, hidden",
        "self._expert(max(expert - 1, 0), hidden",
        ("tests/runtime/test_experts.py::test_every_architecture[mixtral]",),
    ),
    Mutant(
        "stored tensors without owner let through",
        "runtime/plan.py",
        "        if unclaimed:\n",
        "        if False:\n",
        ("tests/runtime/test_loader.py::test_quantized_codes_are_never_read_as_dense_weights",),
    ),
    # What the model computes
    Mutant(
        "RoPE base",
        "runtime/skeleton.py",
        "    for part in (config, config.get_text_config()):\n",
        '    if getattr(config, "rope_parameters", None):\n'
        '        config.rope_parameters["rope_theta"] *= 2\n'
        "    for part in (config, config.get_text_config()):\n",
        (f"{LOGITS}[auto-gptq--w4g32-desc]", f"{ALONE}[llama-ample]", f"{LOSS}[awq-int4-g128]"),
    ),
    Mutant(
        "off-by-one position",
        "runtime/runner.py",
        "batches[0].positions()[None], batches",
        "batches[0].positions()[None] + 1, batches",
        (f"{ALONE}[gpt2-ample]",),
    ),
    Mutant(
        "positions start anew in every chunk",
        "runtime/runner.py",
        "batches[0].positions()[None], batches",
        "torch.cat([torch.arange(chunk.size) for chunk in plan])[None], batches",
        (f"{ALONE}[llama-budget-7]", FIDELITY),
    ),
    Mutant(
        "positions start anew in every recorded step",
        "runtime/graphs.py",
        "positions = [chunk.start for chunk in plan]",
        "positions = [0 for chunk in plan]",
        (f"{ALONE}[llama-budget-7]", f"{ALONE}[llama-ample]", FIDELITY),
    ),
    Mutant(
        "KV scale doubled",
        "attention/kv_dtypes.py",
        "return codes.float() * scale[..., None]",
        "return codes.float() * (2 * scale[..., None])",
        ("tests/attention/test_kv_dtypes.py::test_the_error_is_at_most_half_a_step", f"{LOSS}[kv-int8]"),
    ),
    Mutant(
        "KV scale doubled in the GPU kernels",
        "attention/kernels/tile.py",
        "scores *= tl.load(k_scale",
        "scores *= 2 * tl.load(k_scale",
        ("tests/attention/test_paged.py::test_every_kernel_in_the_interpreter",),
    ),
    Mutant(
        "float16 accumulation in a linear layer",
        "quant/reference.py",
        "F.linear(inputs, dequantize(weight).to(inputs.dtype), bias).to(x.dtype)",
        "F.linear(inputs.half(), dequantize(weight).half(), None if bias is None else bias.half()).to(x.dtype)",
        (
            "tests/quant/test_writers.py::test_auto_gptq_ran_with_rotary_frequencies_in_float16",
            "tests/quant/test_kernels.py::test_every_kernel_multiplies",
            FIDELITY,
        ),
    ),
    Mutant(
        "float16 accumulation in attention",
        "attention/reference.py",
        "scores = q.flatten(2, 3) @ _by_head(k).transpose(2, 3) * spec.scale",
        "scores = (q.flatten(2, 3).half() @ _by_head(k).half().transpose(2, 3)).float() * spec.scale",
        (ATTENTION, FIDELITY),
    ),
    Mutant(
        "one head's values swapped",
        "attention/reference.py",
        "@ _by_head(v)",
        "@ _by_head(v).roll(1, 1)",
        (ATTENTION, FIDELITY),
    ),
    Mutant(
        "keys of a head for its values",
        "attention/kv_cache.py",
        "else gather(self.v, self.v_scale)",
        "else gather(self.k, self.k_scale)",
        (ATTENTION, FIDELITY),
    ),
    Mutant(
        "keys' scales for values in the C kernel",
        "attention/cpu.py",
        "values=_pages(cache.v[call], v_scale,",
        "values=_pages(cache.v[call], k_scale,",
        (FIDELITY,),
    ),
    # What the engine does
    Mutant(
        "stale prefix block",
        "runtime/blocks.py",
        "                self.forget([block])\n",
        "",
        (f"{CACHE}::test_the_end_of_the_least_recently_used_prefix_goes_first", FIDELITY),
    ),
    Mutant(
        "prefix block found after other tokens",
        "runtime/blocks.py",
        "parent = cached.serial",
        "parent = self._root(request)",
        (f"{CACHE}::test_a_full_prefix_is_found_again_and_one_token_is_left", FIDELITY),
    ),
    Mutant(
        "block given back while a window reaches it",
        "runtime/blocks.py",
        "behind = self._behind(group, request.computed)",
        "behind = self._behind(group, request.computed + 1)",
        ("tests/runtime/test_windows.py::test_every_token_finds_what_it_sees_and_nothing_more_is_held",),
    ),
    Mutant(
        "prefix found without the window before its end",
        "runtime/blocks.py",
        "start <= self._behind(group, count * self.size)",
        "start <= count",
        ("tests/runtime/test_windows.py::test_a_prefix_ends_where_the_window_is_whole",),
    ),
    Mutant(
        "sampling from the wrong row",
        "runtime/runner.py",
        "rows.append((request, first + chunk.size - 1, None))",
        "rows.append((request, first, None))",
        (f"{ALONE}[llama-ample]", FIDELITY),
    ),
)
