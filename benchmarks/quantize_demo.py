"""Quantize the bundled demonstration model with AutoAWQ itself: 4 bit, groups of 128, zero points, GEMM packing.

The AWQ checkpoint is there to show that the runtime reads what the wild holds, so the original writer makes it. AutoAWQ
0.2.9 is its last release and was last tested with Transformers 4.51.3, hence an environment of its own:

    python3 -m venv build/awq
    build/awq/bin/pip install torch==2.13.0 transformers==4.51.3 autoawq==0.2.9 accelerate
    build/awq/bin/python -m benchmarks.quantize_demo --model runtime/bundled/bf16 \\
        --calibration build/texts/calibration.jsonl --out runtime/bundled/awq

No GPU is needed; two CPU cores took 13 minutes. AutoAWQ converts the model to float16 before it searches, and
writes scales, norms and the embedding in float16. That costs nothing here: no weight is too large for float16, and the
1529 of 7.3 million bf16 weights that it cannot hold exactly are off by 3e-8 at most. The embedding is not quantized
and, being tied to the output head, is stored once. The tokenizer files are copied as Transformers 5 saved them.
"""

from __future__ import annotations

from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from benchmarks.calibration import WINDOW, calibration_windows, copy_tokenizer, parse_arguments

CONFIG = {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}


class Quantizer(AwqQuantizer):
    """AutoAWQ's own search, kept from overwriting the weights it searches on.

    It sets the weights aside with ``tensor.cpu()`` and scales them in place. With the model on a GPU that makes a
    copy; on a CPU both are one tensor, so each module would keep the first candidate's scale (measured on this model:
    held-out bits per byte 20 % worse, where plain rounding loses 2 %).
    """

    def _compute_best_scale(
        self,
        x: torch.Tensor,
        w_mean: torch.Tensor,
        x_mean: torch.Tensor,
        module2inspect: nn.Module,
        *rest: Any,
    ) -> torch.Tensor:
        hook = module2inspect.register_state_dict_post_hook(copy_state)
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest)
        finally:
            hook.remove()


def copy_state(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    for name, tensor in state.items():
        state[name] = tensor.clone()


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.manual_seed(0)

    # Named outright: Transformers 4 does not know the class that Transformers 5 writes into tokenizer_config.json.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    windows = calibration_windows(arguments.calibration, tokenizer, arguments.windows)
    model = AutoAWQForCausalLM.from_pretrained(str(arguments.model), device_map="cpu", torch_dtype=torch.float16)
    config = model.model.config
    config.rope_theta = config.rope_parameters["rope_theta"]
    for name in ("dtype", "rope_parameters"):  # Transformers 5's names; 4 would save them unread and now untrue
        delattr(config, name)
    print(f"{len(windows)} calibration windows of {WINDOW} tokens")

    model.quantize(
        tokenizer,
        quant_config=CONFIG,
        calib_data=windows,
        max_calib_samples=len(windows),
        max_calib_seq_len=WINDOW,
        quantizer_cls=Quantizer,
    )
    model.save_quantized(str(arguments.out))
    copy_tokenizer(arguments.model, arguments.out)


if __name__ == "__main__":
    main()
