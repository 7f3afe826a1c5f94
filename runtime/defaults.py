"""What a checkpoint says about generating: its tokenizer, the tokens that end an answer, how to sample, how long."""

from __future__ import annotations

from typing import Any

from attention.positions import batch_dependent_rope
from runtime.checkpoint import Checkpoint, locate, read_json
from runtime.config import EngineConfig
from runtime.errors import LoadError

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    folder = checkpoint.folder
    if config.tokenizer:
        folder = locate(config.tokenizer, weights=False, code=config.trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise LoadError(
            f"{folder}: no usable tokenizer ({error}). Name one with --tokenizer-path (tokenizer=...), or work with token "
            "ids: --skip-tokenizer-init (skip_tokenizer_init=True)."
        ) from error


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids after which nothing follows: of the generation configuration, else of the model's, and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = getattr(model.config.get_text_config(), "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    tokens = {*listed, getattr(tokenizer, "eos_token_id", None)}
    return frozenset(token for token in tokens if token is not None)


def sampling_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sampling parameters of ``generation_config.json``; empty if it has none, or there is no such file."""
    file = checkpoint.folder / "generation_config.json"
    stored = read_json(file) if file.is_file() else {}
    return {name: stored[name] for name in SAMPLING_FIELDS if stored.get(name) is not None}


def context_length(config: Any) -> int | None:
    """The longest sequence the model was made for, if its configuration says."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def limit_by_rope(config: Any, asked: int | None, length: int) -> int:
    """Models whose rotary factors depend on the longest sequence of a *batch* are served where they do not."""
    reason = batch_dependent_rope(config)
    if reason is None:
        return length
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    limit = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
    if asked is not None and asked > limit:
        raise LoadError(
            f"max_model_len {asked}: {reason}; sequences beyond {limit} tokens are not supported for this model."
        )
    return min(length, limit)
