"""Formats that exist, are not supported, and what to do about each: the data behind a refusal by name.

The names are values of ``quant_method`` in Transformers 5.23, vLLM 0.33, SGLang 0.5.23 and GPTQModel 7.7.
"""

from __future__ import annotations

INTEGERS = "Use an AWQ or GPTQ copy of the model."
ORIGINAL = "Use the original model, or an AWQ or GPTQ copy of it."

REFUSED = {
    "gguf": "GGUF is not supported, by design. Use the original repository of the model.",
    "torchao": f"torchao stores pickled or versioned tensor subclasses, not a format of its own. {ORIGINAL}",
    "hqq": f"HQQ has packings and float zero points of its own. {INTEGERS}",
    "quanto": f"quanto's layout is private to optimum-quanto, and Transformers does not save it. {INTEGERS}",
    "aqlm": f"AQLM's codes index learned codebooks, not numbers. {INTEGERS}",
    "eetq": f"EETQ stores weights permuted for the GPU that wrote them. {ORIGINAL}",
    "quark": f"Quark exports many schemes, none of which is read yet. {INTEGERS}",
    "vptq": f"VPTQ's codes index learned codebooks, not numbers. {INTEGERS}",
    "spqr": f"SpQR keeps outliers in a sparse matrix beside the codes. {INTEGERS}",
    "higgs": f"HIGGS rotates inputs at run time and stores codes of a grid. {INTEGERS}",
    "bitnet": f"BitNet's ternary weights are trained with quantized activations. {ORIGINAL}",
    "fp_quant": f"FP-Quant rotates inputs at run time. {ORIGINAL}",
    "metal": f"its tensors are for Apple's GPUs. {ORIGINAL}",
    "mlx": f"its tensors are for Apple's GPUs. {ORIGINAL}",
    "sinq": f"SINQ has a second scale along the other side of a weight. {INTEGERS}",
    "fouroversix": f"Four over six quantizes activations at run time. {ORIGINAL}",
    "gemma": f"its layout is private to Gemma's mobile exports. {ORIGINAL}",
    "experts_int8": f"it names a way to quantize while loading, not a format. {ORIGINAL}",
    "qqq": f"QQQ's 4-bit weights are meant for 8-bit activations, with scales of their own. {INTEGERS}",
    "exl2": f"ExLlamaV2's bit width varies within a layer. {INTEGERS}",
    "exl3": f"ExLlamaV3 stores trellis codes and rotates inputs at run time. {INTEGERS}",
    "paroquant": f"ParoQuant rotates inputs at run time. {INTEGERS}",
    "bitblas": f"BitBLAS weights are permuted for one kernel library and one GPU. {INTEGERS}",
    "deepspeedfp": f"it names a way to quantize while loading, not a format. {ORIGINAL}",
    "moe_wna16": "it names a runtime's way to serve experts. Write the file's own format, awq or gptq, in quant_method.",
    "petit_nvfp4": "it names a kernel for NVFP4 files of ModelOpt. Write modelopt in quant_method.",
    "modelslim": f"its tensors are for Ascend NPUs. {ORIGINAL}",
    "w8a8_int8": f"the name tells no layout, and it asks for quantized activations. {INTEGERS}",
    "w8a8_fp8": f"the name tells no layout, and it asks for quantized activations. {ORIGINAL}",
}
"""``quant_method`` -> why not, and the way out."""

SPELLINGS = {"paro": "paroquant", "fpquant": "fp_quant", "four_over_six": "fouroversix", "deepspeed_fp": "deepspeedfp"}


def refusal(name: str) -> str | None:
    """What to tell the owner of a checkpoint in this format, or ``None`` if the name is not one of these."""
    known = name.lower().replace("-", "_")
    return REFUSED.get(SPELLINGS.get(known, known))
