"""What a checkpoint says about generating: its tokenizer, the tokens that end an answer, how to sample, how long."""

from __future__ import annotations

from typing import Any

from attention.hf import separate_lengths
from attention.positions import length_dependent_rope
from runtime.checkpoint import Checkpoint, locate, read_json
from runtime.config import EngineConfig
from runtime.errors import LoadError
from runtime.factors import Factors

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
    """The longest sequence the model was made for, if its configuration says. Dynamic rotary embeddings stretch it."""
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    parameters = getattr(text, "rope_parameters", None) or {}
    if positions is not None and parameters.get("rope_type") == "dynamic":
        return int(positions * (parameters.get("factor") or 1))
    return positions


def length_factors(config: Any, model: Any, max_model_len: int) -> Factors | None:
    """What to mind about rotary factors if sequences have up to ``max_model_len`` tokens, having prepared ``model`` for it;
    ``None``: nothing. Raises :class:`LoadError` if the model's own code hides how it takes the length."""
    rope = length_dependent_rope(config)
    if rope is None or max_model_len <= rope.limit:
        return None
    if not separate_lengths(model):
        raise LoadError(
            f"{rope}. The model's own code does that in a way that is not known here, so sequences would change each other. "
            f"Set max_model_len to at most {rope.limit} (--context-length)."
        )
    return Factors(*rope)
