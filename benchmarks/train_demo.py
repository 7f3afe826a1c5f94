"""Train the bundled demonstration model on the CPython standard library's own sources.

A Llama-style decoder of about 7 M parameters and a byte-level BPE of 4096 tokens. Nothing is downloaded: the text is
the standard library of the interpreter that runs this script, or the folder given by ``--sources``, its test suite
included where it is installed. Every file is assigned once, by the SHA-256 of its relative path, to *train*,
*calibration* (what the recipe is chosen by and AWQ searches on) or *held-out* (what the model card's bits per byte are
measured on; nothing is chosen by them).

Each function is also a training document of its own, dedented, so that a bare ``def name(...):`` is a natural
beginning.

    python -m benchmarks.train_demo --out runtime/bundled/bf16 --texts build/texts --device cuda

writes the model and tokenizer, and ``calibration.jsonl`` and ``heldout.jsonl``. ``benchmarks/quantize_demo.py`` makes
the AWQ checkpoint from them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOUNDARY = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 1024
EXCLUDED = ("site-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3")  # packages, tables, Python 2

Document = tuple[str, str]  # path relative to the library, source text


def read_library(folder: Path) -> Iterator[Document]:
    """Every source file of the standard library that is valid UTF-8 and parses."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if any(part in EXCLUDED for part in name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        if len(text) >= 200:
            yield str(name), text


def split_of(name: str) -> str:
    """The split a file belongs to: 1/40 held-out, 1/40 calibration, the rest train; stable across Python versions."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 40
    return {0: "heldout", 1: "calibration"}.get(bucket, "train")


def functions_of(text: str) -> Iterator[str]:
    """The source of each function of at least three lines, decorators included, moved to the left margin."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 2:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that every string has an encoding; a prompt always begins with the boundary token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", special_tokens=[(BOUNDARY, bpe.token_to_id(BOUNDARY))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights; every input size is a multiple of 128, the group size that the quantized copy uses."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Recipe ``bits-per-byte/1024``: windows of 1023 tokens behind a boundary token, every token scored once."""
    device, boundary = model.device, tokenizer.bos_token_id
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        size += len(text.encode())
        for start in range(0, len(ids), CONTEXT - 1):
            window = torch.tensor([[boundary, *ids[start : start + CONTEXT - 1]]], device=device)
            with torch.inference_mode():
                logits = model(window, use_cache=False).logits[0, :-1].float()
            nats += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return nats / math.log(2) / size


class Batches:
    """Random windows of the packed documents; half of them begin where a document begins."""

    def __init__(self, documents: list[list[int]], boundary: int, seed: int, device: str):
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(documents), generator=self.generator).tolist()
        packed = [token for index in order for token in (boundary, *documents[index])]
        self.stream = torch.tensor(packed, dtype=torch.int32)
        self.starts = (self.stream == boundary).nonzero().flatten()
        self.starts = self.starts[self.starts < len(self.stream) - CONTEXT - 1]
        self.device = device

    def draw(self, rows: int) -> torch.Tensor:
        """``[rows, CONTEXT + 1]`` token ids."""
        anywhere = torch.randint(len(self.stream) - CONTEXT - 1, (rows - rows // 2,), generator=self.generator)
        chosen = torch.randint(len(self.starts), (rows // 2,), generator=self.generator)
        begin = torch.cat([anywhere, self.starts[chosen]])
        window = self.stream[begin[:, None] + torch.arange(CONTEXT + 1)]
        return window.long().to(self.device, non_blocking=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, then a cosine to zero."""
    if step < 200:
        return peak * (step + 1) / 200
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 200) / max(1, steps - 200)))


def train(
    model: LlamaForCausalLM,
    batches: Batches,
    steps: int,
    rows: int,
    peak: float,
    decay: float,
    evaluate: Callable[[int], None],
) -> None:
    """AdamW in float32 with bf16 autocast; ``evaluate(step)`` is called every 1000 steps."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=batches.device == "cuda")
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        window = batches.draw(rows)
        with torch.autocast(batches.device, torch.bfloat16):
            logits = model(window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"step {step:6d}  loss {loss.item():.4f}  {time.time() - started:6.0f} s", flush=True)
        if step % 1000 == 999:
            evaluate(step + 1)


def write_texts(folder: Path, split: str, documents: list[Document]) -> None:
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for name, text in documents:
            file.write(json.dumps({"file": name, "text": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--texts", type=Path, required=True, help="folder for calibration.jsonl and heldout.jsonl")
    parser.add_argument("--sources", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--rows", type=int, default=32, help="windows of 1024 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    for folder in (arguments.out, arguments.texts):
        folder.mkdir(parents=True, exist_ok=True)

    splits: dict[str, list[Document]] = {"train": [], "calibration": [], "heldout": []}
    for name, text in read_library(arguments.sources):
        splits[split_of(name)].append((name, text))
    if not all(splits.values()):
        sys.exit(f"{arguments.sources} holds too few Python sources; name a standard library with --sources")
    for split in ("calibration", "heldout"):
        write_texts(arguments.texts, split, splits[split])

    texts = [text for _, text in splits["train"]]
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(arguments.out)
    pieces = texts + [function for text in texts for function in functions_of(text)]
    documents = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    batches = Batches(documents, tokenizer.bos_token_id, arguments.seed, arguments.device)
    sizes = ", ".join(f"{len(files)} files {split}" for split, files in splits.items())
    print(f"{sizes}; {len(pieces)} training documents, {len(batches.stream):,} tokens")

    model = build_model(tokenizer).to(arguments.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    def evaluate(model: LlamaForCausalLM, label: str) -> None:
        model.eval()
        for split in ("calibration", "heldout"):
            rate = bits_per_byte(model, tokenizer, [text for _, text in splits[split]])
            print(f"{label}: {split} {rate:.4f} bits per byte", flush=True)
        model.train()

    train(
        model,
        batches,
        arguments.steps,
        arguments.rows,
        arguments.learning_rate,
        arguments.weight_decay,
        lambda step: evaluate(model, f"step {step:6d}"),
    )
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    # Read back: ``to`` has rounded the rotary frequencies too, which a loaded model holds in float32.
    model = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.bfloat16).to(arguments.device)
    evaluate(model, "bf16")
    for prompt in ("def fibonacci(n):", "class Stack:", "def read_lines(path):"):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        tokens = model.generate(ids, max_new_tokens=96, do_sample=False)[0]
        print("---", tokenizer.decode(tokens, skip_special_tokens=True), sep="\n")


if __name__ == "__main__":
    main()
