"""Checkpoints that bring their own modelling code: served exactly if it is written for exchangeable attention and trusted,
refused before any weight is read if not, and never imported without the flag."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import save_file

from runtime import EngineConfig, LoadError, inspect
from runtime.engine import Engine
from runtime.loader import load_model
from runtime.server.process import code_may_change
from tests.architectures.sweep import ENGINE, PROMPTS, compare, serve
from tests.architectures.tiny import VOCABULARY

CONFIGURATION = """
from pathlib import Path
from transformers import PreTrainedConfig

(Path({folder!r}) / "imported").touch()

class ParrotConfig(PreTrainedConfig):
    model_type = "parrot"
    vocab_size: int = {vocabulary}
    hidden_size: int = 32
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 64
"""

MODELLING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from .configuration_parrot import ParrotConfig

def eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2).contiguous(), None

class ParrotAttention(nn.Module):
    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        kv = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv)
        self.v_proj = nn.Linear(config.hidden_size, kv)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, **kwargs):
        heads = lambda t: t.view(*t.shape[:2], -1, 8).transpose(1, 2)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        {attend}
        return self.o_proj(out.reshape(*x.shape[:2], -1))

class ParrotModel(PreTrainedModel):
    config_class = ParrotConfig
    base_model_prefix = "model"
    _supports_attention_backend = True

class ParrotForCausalLM(ParrotModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(ParrotAttention(config, i) for i in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, position_ids=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids) + self.places(position_ids)
        for layer in self.layers:
            x = x + layer(x, position_ids=position_ids, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(x))
"""

INTERFACE = (
    "out, _ = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)"
    "(self, q, k, v, None, scaling=8**-0.5, **kwargs)"
)
OWN = "out, _ = eager(self, q, k, v, None, scaling=8**-0.5)"


def write(folder: Path, attend: str) -> Path:
    """A checkpoint with its code; its weights are those of a model of that code."""
    (folder / "configuration_parrot.py").write_text(
        dedent(CONFIGURATION).format(folder=str(folder), vocabulary=VOCABULARY)
    )
    (folder / "modeling_parrot.py").write_text(MODELLING.replace("{attend}", attend))
    config = {
        "model_type": "parrot",
        "architectures": ["ParrotForCausalLM"],
        "dtype": "float32",
        "auto_map": {
            "AutoConfig": "configuration_parrot.ParrotConfig",
            "AutoModelForCausalLM": "modeling_parrot.ParrotForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(shapes(), folder / "model.safetensors")
    return folder


def shapes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"embed.weight": (VOCABULARY, 32), "places.weight": (64, 32), "lm_head.weight": (VOCABULARY, 32)}
    sizes["lm_head.bias"] = (VOCABULARY,)
    for layer in range(3):
        for name, width in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            sizes[f"layers.{layer}.{name}_proj.weight"] = (width, 32)
            sizes[f"layers.{layer}.{name}_proj.bias"] = (width,)
    return {name: torch.randn(size, generator=generator) * 0.3 for name, size in sizes.items()}


@pytest.fixture
def modern(tmp_path: Path) -> Path:
    return write(tmp_path, INTERFACE)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write(tmp_path, OWN)


def test_code_with_the_interface_is_served_exactly(modern: Path) -> None:
    engine = Engine(EngineConfig(model=str(modern), trust_remote_code=True, **ENGINE))
    alone = load_model(modern, trust_remote_code=True, dtype="float32", device="cpu", attn_implementation="eager")
    for place, answer in serve(engine).items():
        assert compare(alone, PROMPTS[place], answer) is None
    assert engine.stats().preemptions > 0


def test_code_without_it_is_refused_before_loading_with_the_changes_it_needs(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("runtime.assembly.load", loads)
    with pytest.raises(LoadError, match="ParrotForCausalLM: no layer calls the attention function") as raised:
        Engine(EngineConfig(model=str(old), trust_remote_code=True, **ENGINE))
    for change in ("(1) its attention calls ALL_ATTENTION_FUNCTIONS", "**kwargs", "(2)", "_supports_attention_backend"):
        assert change in str(raised.value)
    assert "ALL_ATTENTION_FUNCTIONS" in dict(inspect(old, trust_remote_code=True).attention)["attention"]


PLACES = "self.places(position_ids)"
LAYER = "def forward(self, x, **kwargs):"
SHIFTED = "x = x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]"
CONVOLVED = "x = nn.functional.conv1d(x.mT, x.new_ones(32, 1, 3) / 3, padding=2, groups=32)[..., :-2].mT"


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        (PLACES, "self.places(torch.arange(input_ids.shape[1], device=input_ids.device))"),
        (PLACES, "self.places.weight[:input_ids.shape[1]]"),
        (LAYER, f"{LAYER}\n        {SHIFTED}"),
        (LAYER, f"{LAYER}\n        {CONVOLVED}"),
        (LAYER, f"{LAYER}\n        x = x - x.mean(1, keepdim=True)"),
    ],
    ids=["counts-rows", "takes-rows", "shifts-tokens", "convolves-tokens", "averages-tokens"],
)
def test_code_that_answers_otherwise_beside_another_sequence_is_refused(
    written: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attention goes through the interface, so nothing but a trial shows what is wrong."""
    assert written in MODELLING
    monkeypatch.setattr(f"{__name__}.MODELLING", MODELLING.replace(written, instead))
    with pytest.raises(LoadError, match=r"differently beside another one: .* must take positions from position_ids"):
        Engine(EngineConfig(model=str(write(tmp_path, INTERFACE)), trust_remote_code=True, **ENGINE))


def test_a_model_that_the_engine_refuses_still_runs_alone(old: Path) -> None:
    model = load_model(old, trust_remote_code=True, dtype="float32", device="cpu")
    assert model(torch.tensor([PROMPTS[0]])).logits.shape == (1, len(PROMPTS[0]), VOCABULARY)


def test_nothing_is_imported_without_the_flag(modern: Path) -> None:
    marker = modern / "imported"
    for attempt in (
        lambda: Engine(EngineConfig(model=str(modern), **ENGINE)),
        lambda: load_model(modern),
        lambda: inspect(modern),
    ):
        with pytest.raises(LoadError, match=r"needs Python code .* --trust-remote-code"):
            attempt()
        assert not marker.exists()
    inspect(modern, trust_remote_code=True)
    assert marker.exists(), "the marker tells nothing"


@pytest.mark.parametrize(
    ("model", "revision", "may"),
    [("owner/name", None, True), ("owner/name", "main", True), ("owner/name", "0" * 40, False), ("/tmp", None, False)],
)
def test_code_of_the_hub_is_fixed_by_a_commit(model: str, revision: str | None, may: bool) -> None:
    config = EngineConfig(model, trust_remote_code=True, revision=revision)
    assert code_may_change(config) == may
