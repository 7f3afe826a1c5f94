"""Recorded decoding steps: bit for bit what the step gives when it runs, or no recording."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.base import Activation, WeightKind
from quant.kernels import cpu
from quant.kernels.cpu import PATHS, CpuKernel
from runtime import LLM, SamplingParams, assembly, memory
from runtime.graphs import Logits, Step
from runtime.replay import CannotReplay, Recording, StepRecorder
from tests.awq_writer import write_awq
from tests.families import FAMILIES
from tests.formats import CHECKPOINTS
from tests.moe_writer import moe_model, write_moe
from tests.quant.test_kernels import Case
from tests.tiny_models import VOCABULARY, tiny_model

PROMPTS = [
    [(7 * place + 3 * i * i) % VOCABULARY for i in range(length)] for place, length in enumerate((11, 13, 5, 19, 1))
]
"""Of 5 sequences, which end one after the other: steps of every size from 5 to 1."""
GREEDY = [SamplingParams(temperature=0, max_tokens=most, ignore_eos=True) for most in (14, 6, 21, 9, 17)]


class Checking(StepRecorder):
    """Runs each step that is replayed once more as it is, and compares all logits."""

    def __init__(self) -> None:
        super().__init__()
        self.replays: dict[int, int] = {}

    def __call__(self, step: Step) -> Step:
        recorded = super().__call__(step)

        def run() -> Logits:
            found = [tensor.clone() for tensor in recorded()]
            result = step()
            assert all(map(torch.equal, found, result))
            self.replays[len(found[0])] = self.replays.get(len(found[0]), 0) + 1
            return result

        return run


def load(folder: str | Path, **options: Any) -> LLM:
    return LLM(str(folder), skip_tokenizer_init=True, block_size=4, max_total_tokens=512, **options)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", "bfloat16"),
        ("gemma2", "float32"),  # windows, a softcap
        ("gpt_oss", "bfloat16"),  # sinks, experts by its own code
        ("deepseek_v3", "float32"),  # latents
        ("phi3", "float16"),  # one layer for gate and up
    ],
)
def test_a_replay_gives_the_same_bits(kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind, hidden_size=64, intermediate_size=96)
    if kind in ("llama", "gemma2"):
        write_awq(model, tmp_path, group=32)
    else:
        model.save_pretrained(tmp_path)
    wanted = tokens_of(load(tmp_path, dtype=dtype, disable_cuda_graph=True))
    checking = Checking()
    monkeypatch.setattr(assembly, "choose_capture", lambda *_: checking)
    assert tokens_of(load(tmp_path, dtype=dtype)) == wanted
    assert checking.replays.keys() == {1, 2, 3, 4, 5}
    assert sum(checking.replays.values()) >= 20


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("demo", {"activation_quantization": "int8"}),  # a step for each group
        ("demo", {"activation_quantization": "int8", "dtype": "float16"}),
        (CHECKPOINTS / "llmcompressor--w8a8-int8", {}),  # one for each token
        (CHECKPOINTS / "compressed-tensors--nvfp4a16", {}),  # one more scale for the whole weight
        (CHECKPOINTS / "bitsandbytes--int8", {}),  # inputs rounded in torch
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_replay_of_quantized_layers(
    model: str | Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, most = [prompt[:7] for prompt in PROMPTS[:3]], GREEDY[:3]
    wanted = load(model, disable_cuda_graph=True, **options).generate(prompts, most)
    checking = Checking()
    monkeypatch.setattr(assembly, "choose_capture", lambda *_: checking)
    found = load(model, **options).generate(prompts, most)
    assert [each.outputs[0].token_ids for each in found] == [each.outputs[0].token_ids for each in wanted]
    assert checking.replays.keys() == {1, 2, 3}


def test_a_job_that_changes_for_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panel after panel of a weight is dequantized by one."""
    write_awq(tiny_model("llama", hidden_size=64, intermediate_size=96), tmp_path, group=32)
    monkeypatch.setattr(cpu, "PANEL_ROWS", (0,) * len(cpu.PANEL_ROWS))
    monkeypatch.setattr(cpu, "PANEL_BYTES", 1)
    checking = Checking()
    monkeypatch.setattr(assembly, "choose_capture", lambda *_: checking)
    load(tmp_path, dtype="float32").generate(PROMPTS[:2], GREEDY[1])
    assert checking.replays[2] >= 4


def test_what_python_counts_is_not_recorded(tmp_path: Path) -> None:
    """Quantized experts run for the tokens that each of them got."""
    write_moe(moe_model("mixtral"), tmp_path, FAMILIES["awq"])
    llm = load(tmp_path)
    line = next(line for line in llm.report.splitlines() if line.startswith("graphs"))
    assert "none, in a decoding step" in line
    assert llm.engine.runner.graphs is None


# Single functions ----------------------------------------------------------------------------------------------------


def inputs() -> Tensor:
    return torch.randn(4, 6)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "views": lambda x: x.t().reshape(-1)[3:].view(3, 7).transpose(0, 1) * 2,
    "in place": lambda x: x.clone().add_(1).mul_(x)[1:].relu_(),
    "into what is allocated": lambda x: torch.empty(8, 6).copy_(torch.cat([x, x])),
    "constants": lambda x: x * torch.tensor([1.0, 2, 3, 4, 5, 6]) + torch.arange(6) + torch.zeros(6).add_(x[0]),
    "several results": lambda x: sum((*x.topk(3), *x.max(-1, keepdim=True), *x.split(3, -1)[1:]), torch.zeros(1)),
    "other types": lambda x: (x.double().to(torch.bfloat16) @ x.bfloat16().t()).float(),
    "a promoted type": lambda x: x.bfloat16().to(torch.promote_types(torch.bfloat16, torch.float32)) + 1,
    "indices": lambda x: x[torch.tensor([2, 0])][:, x.argsort(-1)[0]],
    "layers": lambda x: nn.functional.layer_norm(nn.functional.softmax(x, -1), (6,)),
    "masks": lambda x: x.masked_fill(x > 0, 7).where(x > -1, 3),
    "nothing": lambda x: x,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.inference_mode()
def test_functions(name: str) -> None:
    function, x = FUNCTIONS[name], inputs()
    recording = Recording()
    result = recording.of(lambda: function(x))  # type: ignore[arg-type, return-value]
    for _ in range(3):
        x.copy_(inputs())
        recording.spoil()
        recording.replay()
        assert torch.equal(result, function(x))


OTHERS = torch.ones(6)

CHANGING: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: x * x[0, 0].item(),
    "a list": lambda x: x * x[0].tolist()[0],
    "an array": lambda x: x * torch.from_numpy(x.numpy()),
    "a condition": lambda x: x if x[0, 0] > 0 else -x,
    "equality": lambda x: x if torch.equal(x, x) else -x,
    "a shape": lambda x: x[x[:, 0] > 0],
    "places": lambda x: x.nonzero(),
    "a shape in place": lambda x: (x + 1).t_() @ x,
    "a tensor of others": lambda x: OTHERS.add_(x[0]),
}


@pytest.mark.parametrize("name", CHANGING)
@torch.inference_mode()
def test_functions_that_are_not_the_same_each_time(name: str) -> None:
    function, x = CHANGING[name], inputs()
    with pytest.raises(CannotReplay, match=r"writes to|tells Python|changes the shape"):
        Recording().of(lambda: function(x))


WEIGHTS = {
    "int8 inputs per token": (Case(48, 256, (1, 64), zero_point=True), Activation(WeightKind.INT8)),
    "int8 inputs per group": (Case(48, 256, (1, 64)), Activation(WeightKind.INT8, group=128)),
    "int8 inputs, static": (Case(48, 256, (1, 256), "int8"), Activation(WeightKind.INT8, static=True)),
    "fp8 inputs": (Case(48, 256, (48, 256), "fp8", scale=torch.float32), Activation(WeightKind.FP8)),
    "table": (Case(48, 256, (1, 64), "nf4", scale=torch.float32), None),
}


@pytest.mark.parametrize("widest", [PATHS[1], PATHS[-1]])
@pytest.mark.parametrize("name", WEIGHTS)
@torch.inference_mode()
def test_quantized_weights_that_were_never_multiplied_before(name: str, widest: str) -> None:
    case, how = WEIGHTS[name]
    weight = case.weight()
    scale = torch.tensor([0.03]) if how is not None and how.static else None
    weight = dataclasses.replace(weight, scheme=dataclasses.replace(weight.scheme, activation=how), input_scale=scale)
    kernel = CpuKernel(widest)
    if (refusal := kernel.refuses(weight.scheme, weight.shape, torch.device("cpu"))) is not None:
        pytest.skip(refusal)
    prepared, x, recording = kernel.prepare(weight), torch.randn(4, 256).bfloat16(), Recording()
    result = recording.of(lambda: kernel.apply(x, prepared, None))  # type: ignore[arg-type, return-value]
    for _ in range(2):
        x.copy_(torch.randn(4, 256))
        recording.spoil()
        recording.replay()
        assert torch.equal(result, kernel.apply(x, prepared, None))


@torch.inference_mode()
def test_what_is_written_behind_the_recording() -> None:
    x = inputs()

    def step() -> Logits:
        y = torch.empty(4, 6)
        ctypes.memmove(y.data_ptr(), x.data_ptr(), 96)
        return Logits.of(y)

    with pytest.raises(CannotReplay, match="something else"):
        StepRecorder()(step)()


@torch.inference_mode()
def test_only_the_first_step_has_to_work() -> None:
    x, record = inputs(), StepRecorder()
    record(lambda: Logits.of(x + 1))()
    as_it_is = record(lambda: Logits.of(x[x[:, 0] > -9] + 1))
    for _ in range(2):
        x.copy_(inputs())
        assert torch.equal(as_it_is().values, x + 1)


@torch.inference_mode()
def test_memory_is_bounded() -> None:
    x, runs = inputs(), []

    def step() -> Logits:
        runs.append(1)
        return Logits.of(x + 1)

    alone = Recording()
    alone.of(step)
    assert alone.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in alone.made.values()) >= 96
    with pytest.raises(CannotReplay, match=f"takes more memory than the {alone.nbytes - 1} B left for it"):
        StepRecorder(alone.nbytes - 1)(step)()
    record = StepRecorder(2 * alone.nbytes - 1)
    first, second = record(step), record(step)
    runs.clear()
    for _ in range(3):
        first()
    assert (len(runs), record.nbytes) == (1, alone.nbytes)
    for _ in range(3):
        second()
    assert len(runs) == 5, "it runs as it is, after it was tried once"
    assert record.nbytes == alone.nbytes


def test_recorded_steps_take_half_of_what_the_cache_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    def line(available: int) -> str:
        monkeypatch.setattr(memory, "available_bytes", lambda device: available)
        report = load("demo", dtype="float32").report
        return next(line for line in report.splitlines() if line.startswith("graphs"))

    cache = load("demo", dtype="float32").engine.size.nbytes
    assert line(cache + (2 << 30)).endswith("replayed then, in at most 256.0 MiB")
    assert line(cache + (64 << 20)).endswith("replayed then, in at most 32.0 MiB")
    assert line(cache + 2000).endswith(
        "none, in a decoding step what has to stay takes more memory than the 1000 B left for it"
    )
