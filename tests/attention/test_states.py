"""States of recurrent layers: what is recorded of a mixer, and that sequences keep theirs apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, LinearAttentionLayer

from attention import AttentionBatch, AttentionError, KVCache, UnsupportedAttention, forward_batch, read_specs
from attention.hf import NAME, prepare, read_layers
from attention.reference import ReferenceBackend
from attention.states import MixerSpec, Segment, SequenceStates, StateCache, StateKey, StateSpec, bytes_per_sequence
from tests.architectures.sweep import PROMPTS, alone, eager_model
from tests.architectures.tiny import tiny_config

CONV, RECURRENT = StateKey("conv", 3), StateKey("recurrent", 3)
MIXER = MixerSpec(
    "mixer", (StateSpec(CONV, (2, 4), torch.float32), StateSpec(RECURRENT, (3,), torch.bfloat16)), continues=True
)


@pytest.fixture
def cache() -> StateCache:
    return StateCache([MIXER], 5, "cpu")


def started(cache: StateCache, slot: int, inputs: Tensor) -> Tensor:
    states = SequenceStates(cache, [Segment(slot, 0, inputs.shape[-1], fresh=True)])
    out = states.update_conv_state(inputs, 3, conv_kernel_size=4)
    states.update_recurrent_state(torch.full((1, 3), float(slot)), 3)
    states.store()
    return out


@pytest.mark.parametrize("lengths", [(2, 1, 1, 3), (6, 1, 5), (1, 1)])
def test_convolutions_see_what_transformers_own_cache_shows_them(cache: StateCache, lengths: tuple[int, ...]) -> None:
    theirs = LinearAttentionLayer()
    for step, length in enumerate(lengths):
        inputs = torch.randn(1, 2, length)
        states = SequenceStates(cache, [Segment(2, 0, length, fresh=step == 0)])
        seen = states.update_conv_state(inputs, 3, conv_kernel_size=4)
        states.store()
        assert torch.equal(seen, theirs.update_conv_state(inputs, conv_kernel_size=4))
        assert torch.equal(cache.pool[CONV][2:3], theirs.conv_states[0])


def test_a_sequence_that_starts_does_not_see_what_another_left(cache: StateCache) -> None:
    started(cache, 1, torch.ones(1, 2, 6))
    states = SequenceStates(cache, [Segment(1, 0, 1, fresh=True)])
    assert states.get_conv_state(3) is None
    assert states.get_recurrent_state(3) is None


def test_states_of_stacked_sequences_are_changed_in_place_and_go_back_to_their_slots(cache: StateCache) -> None:
    for slot in (0, 1, 4):
        started(cache, slot, torch.full((1, 2, 4), float(slot)))
    states = SequenceStates(cache, [Segment(4, 0, 1, False), Segment(0, 1, 1, False)])
    conv, recurrent = states.get_conv_state(3), states.get_recurrent_state(3)
    assert conv is not None
    assert recurrent is not None
    assert recurrent[:, 0].tolist() == [4.0, 0.0]
    conv += 10.0
    states.update_recurrent_state(recurrent + 1.0, 3)
    states.store()
    assert cache.pool[CONV][:, 0, 0].tolist()[:2] == [10.0, 1.0]
    assert cache.pool[CONV][4, 0, 0] == 14.0
    assert [cache.pool[RECURRENT][slot, 0].item() for slot in (0, 1, 4)] == [1.0, 1.0, 5.0]


def test_states_that_were_not_recorded_are_an_error(cache: StateCache) -> None:
    states = SequenceStates(cache, [Segment(0, 0, 2, fresh=True)])
    with pytest.raises(AttentionError, match="its recurrent state 1 of layer 3, never recorded"):
        states.get_recurrent_state(3, state_idx=1)
    with pytest.raises(AttentionError, match=r"is \[1, 4\], but \[1, 3\] was recorded"):
        states.update_recurrent_state(torch.zeros(1, 4), 3)


def test_bytes_are_those_of_all_states() -> None:
    assert bytes_per_sequence([MIXER, MIXER]) == 2 * (2 * 4 * 4 + 3 * 2)
    assert sum(t[0].nbytes for t in StateCache([MIXER], 5, "cpu").pool.values()) == bytes_per_sequence([MIXER])


@pytest.mark.parametrize(
    ("model_type", "mixers", "attention", "continues"),
    [
        ("mamba2", 4, 0, True),
        ("mamba", 4, 0, False),
        ("jamba", 2, 2, False),
        ("qwen3_next", 2, 2, True),
        ("minimax", 2, 2, True),
        ("falcon_h1", 4, 4, True),
        pytest.param(
            *("nemotron_h", 1, 1, True),
            marks=pytest.mark.skipif(
                "moe" in DYNAMIC_LAYER_TYPE_MAPPING, reason="this Transformers gives layers of experts alone a state"
            ),
        ),
        ("llama", 0, 4, True),
    ],
)
def test_recording_finds_what_is_kept_and_whether_it_can_be_continued(
    model_type: str, mixers: int, attention: int, continues: bool
) -> None:
    layers = read_layers(tiny_config(model_type))
    assert (len(layers.mixers), len(layers.attention)) == (mixers, attention)
    assert all(mixer.continues == continues for mixer in layers.mixers)
    if mixers:
        with pytest.raises(UnsupportedAttention, match=f"{mixers} of its layers keep a recurrent state"):
            read_specs(tiny_config(model_type))


def test_states_have_the_dtype_that_the_model_computes_them_in() -> None:
    (mixer, *_) = read_layers(tiny_config("qwen3_next"), dtype=torch.bfloat16).mixers
    assert {state.key.kind: state.dtype for state in mixer.states} == {
        "conv": torch.bfloat16,
        "recurrent": torch.float32,
    }


# A model --------------------------------------------------------------------------------------------------------------


class Served:
    """A tiny hybrid over pages and slots, driven by hand."""

    def __init__(self, model_type: str) -> None:
        self.eager = eager_model(model_type)
        self.model = eager_model(model_type)
        self.model.set_attn_implementation(NAME)
        prepare(self.model)
        self.layers = read_layers(tiny_config(model_type))
        self.states: StateCache | None = StateCache(self.layers.mixers, 4, "cpu")
        self.cache = KVCache(self.layers.attention, 8, 16, torch.float32, "cpu")

    @torch.no_grad()
    def forward(self, chunks: list[tuple[int, list[int], int]], **changes: Any) -> list[Tensor]:
        """Logits of chunks ``(slot, tokens, start)``, packed."""
        sizes = [len(tokens) for _, tokens, _ in chunks]
        ends = [start + len(tokens) for _, tokens, start in chunks]
        batch = AttentionBatch.pack(sizes, ends, [[slot] for slot, _, _ in chunks], 16)
        segments = [
            Segment(slot, sum(sizes[:place]), sizes[place], changes.get("fresh", start == 0))
            for place, (slot, _, start) in enumerate(chunks)
        ]
        with forward_batch(batch, self.cache, ReferenceBackend(), self.layers.attention, self.states, segments):
            ids = [token for _, tokens, _ in chunks for token in tokens]
            out = self.model(input_ids=torch.tensor([ids]), position_ids=batch.positions()[None], use_cache=False)
        return list(out.logits[0].split(sizes))


@pytest.fixture(scope="module")
def served() -> Served:
    return Served("qwen3_next")


def test_packed_chunks_and_stacked_decodes_are_those_of_each_sequence_alone(served: Served) -> None:
    a, b = PROMPTS[0], PROMPTS[1]
    wanted_a, wanted_b = alone(served.eager, a), alone(served.eager, b)
    first = served.forward([(2, a[:5], 0), (0, b[:7], 0)])
    mixed = served.forward([(0, b[7:10], 7), (2, a[5:6], 5)])
    stacked = served.forward([(2, a[6:7], 6), (0, b[10:11], 10)])
    torch.testing.assert_close(torch.cat([first[0], mixed[1], stacked[0]]), wanted_a[:7], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat([first[1], mixed[0], stacked[1]]), wanted_b[:11], rtol=0, atol=1e-4)


def test_taking_a_new_sequence_for_an_old_one_would_be_noticed(served: Served) -> None:
    a = PROMPTS[0]
    wanted = alone(served.eager, a)
    served.forward([(1, PROMPTS[1], 0)])
    (stale,) = served.forward([(1, a, 0)], fresh=False)
    assert (stale - wanted).abs().max() > 1e-3
    (fresh,) = served.forward([(1, a, 0)])
    torch.testing.assert_close(fresh, wanted, rtol=0, atol=1e-4)


def test_a_forward_without_states_is_an_error(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "states", None)
    with pytest.raises(AttentionError, match="keeps a recurrent state, but this forward brings no states"):
        served.forward([(1, PROMPTS[0], 0)])


def test_outside_of_a_batch_recurrent_layers_are_transformers_own(served: Served) -> None:
    mixer = served.model.model.layers[0].linear_attn
    hidden = torch.randn(1, 5, 32)
    torch.testing.assert_close(mixer(hidden), served.eager.model.layers[0].linear_attn(hidden))
