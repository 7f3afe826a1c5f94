"""From a configuration to what an engine turns: the loaded model, its cache, a scheduler and a runner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from attention.base import AttentionError
from attention.hf import NAME as ATTENTION
from attention.hf import Layers, prepare, read_layers
from attention.kv_cache import KVCache
from attention.layout import CacheLayout
from attention.registry import Selection, select
from attention.states import StateCache, bytes_per_sequence
from quant.kernels.native import build
from runtime.blocks import BlockPool
from runtime.checkpoint import Checkpoint
from runtime.config import EngineConfig
from runtime.defaults import context_length, end_tokens, length_factors, load_tokenizer, sampling_defaults
from runtime.errors import LoadError
from runtime.fusion import plan_siblings
from runtime.graphs import batch_sizes, capture_decodes, choose_capture, recorded_bytes, reserved_bytes
from runtime.kv_storage import Storage, plan_storage
from runtime.loader import LoadedModel, load
from runtime.memory import CacheSize, size_cache
from runtime.native import settle
from runtime.plan import ABSORBED, LoadPlan, make_plan
from runtime.replay import StepRecorder
from runtime.report import engine_report
from runtime.runner import Runner
from runtime.scheduler import Scheduler

MAX_BATCHED_TOKENS = 2048


@dataclass(frozen=True)
class Parts:
    """Of one engine. ``vocabulary`` counts the rows of the input embedding; ``sampling_defaults`` are the checkpoint's."""

    loaded: LoadedModel
    layers: Layers
    tokenizer: Any
    size: CacheSize
    vocabulary: int
    end_tokens: frozenset[int]
    sampling_defaults: dict[str, Any]
    scheduler: Scheduler
    runner: Runner
    report: str


class _Decided(NamedTuple):
    """Before any weight is read."""

    plan: LoadPlan
    layers: Layers
    selection: Selection
    storage: Storage


def assemble(config: EngineConfig) -> Parts:
    """Load the model of ``config`` and make room for what it will serve. Raises :class:`LoadError`."""
    checkpoint = Checkpoint.open(config.model, config.revision, code=config.trust_remote_code)
    plan, layers, selection, storage = _decide(config, checkpoint)
    specs, mixers = layers.attention, layers.mixers
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, checkpoint)
    loaded = load(plan, ATTENTION)
    settled = settle(loaded.model, plan, config.native)
    prepare(loaded.model)
    context = context_length(plan.config)
    # A state belongs to one sequence at one token: nobody else can start from it, and some cannot be continued.
    whole_prompts = not all(mixer.continues for mixer in mixers)
    max_batched = config.max_num_batched_tokens or MAX_BATCHED_TOKENS
    longest_chunk = None if whole_prompts else max_batched
    layout = CacheLayout.of(specs, config.max_model_len or context)
    token_bytes = KVCache.bytes_per_token(specs, storage.dtype, layout)
    state_bytes = bytes_per_sequence(mixers) * config.max_num_seqs
    vocabulary = int(cast(Any, loaded.model).get_input_embeddings().num_embeddings)
    capture = choose_capture(config, plan.device, selection.backend, bool(mixers), bool(plan.scaled_together))
    captures = not isinstance(capture, str)
    on_device = captures and plan.device.type != "cpu"
    graph_bytes = reserved_bytes(batch_sizes(config.max_num_seqs), vocabulary) if on_device else 0
    size = size_cache(
        config, token_bytes, context, plan.device, state_bytes, graph_bytes, layout.reaches, longest_chunk
    )
    if isinstance(capture, StepRecorder):
        capture.most_bytes = recorded_bytes(size.spare)
    # One block more is nobody's: rows of a graph that stand for no sequence write there.
    blocks = size.blocks + captures
    cache = KVCache(specs, blocks, size.block_size, storage.dtype, plan.device, storage.static, layout)
    factors = length_factors(plan.config, loaded.model, size.max_model_len)
    pool = BlockPool(
        size.blocks,
        size.block_size,
        caching=config.enable_prefix_caching and not mixers,
        reaches=layout.reaches,
        longest_chunk=longest_chunk,
    )
    scheduler = Scheduler(pool, max_batched, config.max_num_seqs, whole_prompts=whole_prompts, factors=factors)
    states = StateCache(mixers, scheduler.max_running, plan.device) if mixers else None
    runner = Runner(loaded.model, specs, selection.backend, cache, states, factors)
    graphs = capture_decodes(runner, capture, scheduler.max_running, size.max_model_len)
    report = engine_report(loaded, layers, selection, size, layout, str(storage), graphs, settled)
    ends = end_tokens(loaded.model, tokenizer)
    return Parts(
        loaded, layers, tokenizer, size, vocabulary, ends, sampling_defaults(checkpoint), scheduler, runner, report
    )


def _decide(config: EngineConfig, checkpoint: Checkpoint) -> _Decided:
    plan = make_plan(checkpoint, **config.loading)
    try:
        # What nothing here computes comes first: such a model may store its tensors in ways of its own, too.
        layers = read_layers(plan.config, plan.trust_remote_code, plan.dtype, siblings=config.fuse)
        plan.require_complete()
        plan = plan.dequantizing(layers.absorbed, ABSORBED)
        plan = replace(plan, siblings=plan_siblings(plan, layers.siblings))
        selection = select(layers.attention, plan.device, config.attention_backend, build)
        return _Decided(plan, layers, selection, plan_storage(plan, layers, config.kv_cache_dtype))
    except AttentionError as error:
        raise LoadError(f"{checkpoint.folder}: {error}") from error
