"""What users of quantized models complained about elsewhere, what happens here, and the tests that show it: the data behind
README.md of this folder.

    python -m tests.complaints.catalogue --write      writes the table
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """# Complaints

What users of quantized models ran into with other runtimes, in our words, and what happens in the same situation here. Written
by `python -m tests.complaints.catalogue --write`; a test compares it with the list.

| | complaint | where | here | proved by |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Complaint:
    """``where`` are issues and pull requests on GitHub, ``owner/repo#number``; ``tests`` are pytest's node ids under tests/."""

    number: int
    what: str
    where: tuple[str, ...]
    here: str
    tests: tuple[str, ...]


SILENT, LOADING, RUNNING = (f"complaints/test_{name}.py" for name in ("silent", "loading", "running"))
TENSORS_DECIDE = f"{SILENT}::test_tensors_decide_whatever_the_skip_list_says"

COMPLAINTS = (
    Complaint(
        1,
        "An FP8 repack whose index names scales that no shard holds is served, and its answers are wrong.",
        ("vllm-project/vllm#57108",),
        "Both the index and the missing scale are errors before a weight is read.",
        (
            f"{SILENT}::test_scales_that_an_index_names_and_no_shard_holds",
            f"{SILENT}::test_an_fp8_weight_without_its_scale",
        ),
    ),
    Complaint(
        2,
        "The skip entry `mlp.gate` also took `mlp.gate_up_proj`, by substring: accuracy 0 %.",
        ("sgl-project/sglang#23467", "sgl-project/sglang#26287"),
        "What is stored quantized is quantized; an entry contradicts only where it names whole components.",
        (f"{SILENT}::test_a_skip_entry_that_is_part_of_another_name",),
    ),
    Complaint(
        3,
        "Short skip entries were missed by exact matching, and bfloat16 layers taken for FP8.",
        ("vllm-project/vllm#44628", "vllm-project/vllm#21669"),
        "A layer that is stored dense stays dense, whatever the list says; entries that name no module are reported.",
        (TENSORS_DECIDE, "quant/test_unmatched.py::test_only_entries_in_vain_are_reported"),
    ),
    Complaint(
        4,
        "A skip list written with fused names (`qkv_proj`) was not honoured.",
        ("vllm-project/vllm#43981", "sgl-project/sglang#26213"),
        "The same; and the tree stays unfused, so q, k and v may differ.",
        (TENSORS_DECIDE,),
    ),
    Complaint(
        5,
        "A skip list with the paths of a multimodal wrapper matched nothing in a text-only load: weights cast without scales.",
        ("huggingface/transformers#48349",),
        "The same: no list can make codes out of a dense tensor.",
        (TENSORS_DECIDE,),
    ),
    Complaint(
        6,
        "GPTQ's zero points are off by one where `checkpoint_format` is not what the tensors hold.",
        ("vllm-project/vllm#38966", "vllm-project/vllm#26092", "vllm-project/vllm#26343"),
        "Symmetric weights whose zero points are all one off are an error that names the right format.",
        (f"{SILENT}::test_zero_points_of_the_other_gptq_version",),
    ),
    Complaint(
        7,
        "Scale slots stay uninitialised where q, k and v are fused on disk under one scale.",
        ("vllm-project/vllm#39764",),
        "A fused layer is one layer with one scale; nothing is split, and tests fill unwritten memory with NaN.",
        (f"{SILENT}::test_fused_projections_under_one_scale",),
    ),
    Complaint(
        8,
        "Biases are lost when weights are quantized to FP8 (Qwen2).",
        ("vllm-project/vllm#39663",),
        "A bias is a parameter like any other and has to be loaded; every one has a source or loading fails.",
        (f"{SILENT}::test_biases_beside_fp8_weights",),
    ),
    Complaint(
        9,
        "GPTQ answers `!!!!`: float16 overflows, or a broken 4-bit kernel, forced by naming the format.",
        ("vllm-project/vllm#14126", "vllm-project/vllm#9618", "QwenLM/Qwen3#945"),
        "Kernels are held to the reference in every dtype, a CPU computes float16 files in bfloat16, the format chooses no "
        "kernel, and a model that starts with one certain token is not served.",
        (
            "quant/test_kernels.py::test_every_kernel_multiplies",
            "runtime/test_loader.py::test_dtypes",
            "runtime/test_guard.py::test_a_model_that_always_says_the_same_does_not_start",
        ),
    ),
    Complaint(
        10,
        "GPTQ with `desc_act` gives nonsense when split over several GPUs.",
        ("vllm-project/vllm#7374",),
        "Cannot arise: there is no tensor parallelism. On one device act-order gives the writer's logits.",
        ("quant/test_formats.py::test_logits_are_those_of_the_writer",),
    ),
    Complaint(
        11,
        "AWQ experts answer garbage, or decay into noise.",
        ("sgl-project/sglang#6654", "sgl-project/sglang#4158"),
        "Experts are multiplied exactly or the checkpoint is refused by name; none is ever left to chance.",
        (
            f"{SILENT}::test_awq_experts_are_right",
            "runtime/test_loader.py::test_a_damaged_expert_is_found_before_weights_are_read",
        ),
    ),
    Complaint(
        12,
        "Naming the faster kernel (`awq_marlin`) lost `modules_to_not_convert`.",
        ("vllm-project/vllm#9894", "vllm-project/vllm#9832"),
        "Every spelling is one format, and a kernel knows no list.",
        (f"{LOADING}::test_a_spelling_with_a_kernel_in_it_changes_no_layer",),
    ),
    Complaint(
        13,
        "compressed-tensors' `ignore`, spelled for a wrapper (`q_proj.linear`), was missed; a tile error came far away.",
        ("sgl-project/sglang#35792", "sgl-project/sglang#28018"),
        "The layer is stored dense and stays so.",
        (f"{LOADING}::test_an_ignore_list_of_a_wrapper",),
    ),
    Complaint(
        14,
        "bitsandbytes skipped by substring: `kv_proj` inside `qkv_proj`.",
        ("vllm-project/vllm#9887",),
        "Whole components only, and the tensors decide.",
        (f"{LOADING}::test_a_bitsandbytes_skip_entry_inside_another_name",),
    ),
    Complaint(
        15,
        "Small models with tied embeddings that store `lm_head` as well: KeyError.",
        ("sgl-project/sglang#2935",),
        "Both are accounted for and the model loads.",
        (f"{LOADING}::test_tied_embeddings_and_a_stored_head",),
    ),
    Complaint(
        16,
        "Quantized output layers, tied ones, and quantized embeddings crash.",
        ("vllm-project/vllm#45102", "vllm-project/vllm#45543", "vllm-project/vllm#54304"),
        "A quantized output layer loads, tied or not; a quantized embedding is read row by row.",
        (
            "runtime/test_quantized_inputs.py::test_a_quantized_output_layer_is_no_longer_tied_to_the_embedding",
            "runtime/test_loader_gptq.py::test_a_quantized_output_layer_leaves_a_tied_embedding_dense",
            f"{LOADING}::test_a_quantized_embedding_means_what_its_codes_and_scales_say",
        ),
    ),
    Complaint(
        17,
        '"Input size is not aligned with the quantized weight shape", blamed on a parallelism that is not there.',
        ("vllm-project/vllm#5675", "vllm-project/vllm#11671", "vllm-project/vllm#26182", "QwenLM/Qwen3-VL#831"),
        "The message names module, sizes and the entry; formats with short last groups load.",
        (
            "runtime/test_loader.py::test_a_group_that_does_not_divide",
            "runtime/test_loader_gptq.py::test_models_and_shapes_of_every_kind",
        ),
    ),
    Complaint(
        18,
        "AWQ refuses bfloat16, and float16 gives that model NaN.",
        ("vllm-project/vllm#1823", "vllm-project/vllm#1114", "vllm-project/vllm#1941"),
        "Every format runs in every dtype.",
        (f"{LOADING}::test_awq_in_every_dtype",),
    ),
    Complaint(
        19,
        "Pre-quantized bitsandbytes checkpoints need a magic pair of flags, or end in KeyError `absmax`.",
        ("vllm-project/vllm#11010", "vllm-project/vllm#10710", "vllm-project/vllm#23632", "vllm-project/vllm#15396"),
        "They load without a flag; the flag confirms, and a missing tensor is named.",
        (
            f"{LOADING}::test_bitsandbytes_needs_no_flags",
            "runtime/test_quantized_inputs.py::test_a_missing_companion_is_named",
        ),
    ),
    Complaint(
        20,
        "A quantization_config inside `text_config` is not found.",
        ("vllm-project/vllm#11122",),
        "It is found there, and in every side file.",
        ("runtime/test_checkpoint.py::test_the_quantization_config_is_found_where_tools_put_it",),
    ),
    Complaint(
        21,
        "Layers with head sizes of their own crash, under quantization as a kernel's shape error.",
        ("vllm-project/vllm#44494", "vllm-project/vllm#48432", "vllm-project/vllm#48652", "vllm-project/vllm#48658"),
        "Sizes come from a recorded forward, call by call, not from the configuration.",
        (
            "attention/test_hf.py::test_dimensions_are_those_of_the_tensors_not_of_the_config",
            "attention/test_hf.py::test_logits_are_those_of_each_sequence_alone",
        ),
    ),
    Complaint(
        22,
        "Extra tensors or layers for multi-token prediction: no module named so.",
        ("vllm-project/vllm#28517", "vllm-project/vllm#18602"),
        "What Transformers leaves out is left out and reported; anything else is an error that lists it.",
        (f"{LOADING}::test_layers_for_multi_token_prediction_are_left_out_and_reported",),
    ),
    Complaint(
        23,
        "Naming the format froze the slow kernel: 23 tokens a second instead of 123.",
        ("vllm-project/vllm#21376", "sgl-project/sglang#4263"),
        "`--quantization` confirms, `--kernel` chooses.",
        ("runtime/test_loader.py::test_naming_the_format_does_not_choose_the_kernel",),
    ),
    Complaint(
        24,
        "Quantized is slower than float16 in prefill and large batches.",
        ("vllm-project/vllm#2268", "vllm-project/vllm#5316", "casper-hansen/AutoAWQ#717", "vllm-project/vllm#2566"),
        "From a measured number of rows on, weights are dequantized by panels for a dense product.",
        (f"{RUNNING}::test_many_rows_are_multiplied_densely",),
    ),
    Complaint(
        25,
        "Memory runs out while loading a model that would fit once quantized.",
        ("vllm-project/vllm#7200", "vllm-project/vllm#31805", "huggingface/transformers#43032"),
        "The plan says the peak: what is stored and one layer. One layer at a time is repacked, and its stored tensors freed.",
        (
            f"{RUNNING}::test_one_layer_at_a_time_is_repacked",
            "runtime/test_loader.py::test_packed_tensors_are_freed_after_the_repack",
        ),
    ),
    Complaint(
        26,
        "FP8 on a GPU without FP8 units ends in a compiler's trace.",
        ("sgl-project/sglang#7715", "sgl-project/sglang#12887", "sgl-project/sglang#5871", "vllm-project/vllm#17581"),
        "The reference takes every scheme on every device; who refused, and why, is in the report.",
        (f"{RUNNING}::test_every_scheme_has_a_kernel_and_every_refusal_a_sentence",),
    ),
    Complaint(
        27,
        "The method in the configuration does not match the one that was asked for, of one and the same format.",
        ("vllm-project/vllm#19050", "intel/auto-round#2242"),
        "Spellings of one format are one; a real difference names both and the way out.",
        (f"{RUNNING}::test_names_of_one_format_do_not_clash",),
    ),
    Complaint(
        28,
        "AWQ on a CPU with AVX2 only: the kernel claims support and lacks a function at the first forward.",
        ("vllm-project/vllm#55613", "vllm-project/vllm#22213"),
        "The library says which paths the processor has, every path is tested, and without a compiler the reference runs.",
        (
            "quant/test_kernels.py::test_every_kernel_multiplies",
            "quant/test_kernels.py::test_without_a_compiler_the_reference_runs_and_says_why",
        ),
    ),
)


def link(where: str) -> str:
    repository, _, number = where.partition("#")
    return f"[{where}](https://github.com/{repository}/issues/{number})"


def table() -> str:
    """All of them as Markdown."""
    return HEAD + "".join(
        f"| {c.number} | {c.what} | {', '.join(map(link, c.where))} | {c.here} | {', '.join(f'`{t}`' for t in c.tests)} |\n"
        for c in COMPLAINTS
    )


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    (HERE / "README.md").write_text(table())
