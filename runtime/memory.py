"""How much memory there is, and how much of it the KV cache gets."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from attention.base import Reach
from runtime.blocks import most_blocks
from runtime.config import EngineConfig
from runtime.errors import LoadError

CACHE_FRACTION = 0.5
"""Of the memory available after the weights are loaded, when no size is asked for."""

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class CacheSize:
    """The KV cache in blocks, and the longest sequence that is served; ``sequences`` such sequences fit at once. A sequence
    has a block for each of ``groups`` groups of layers, as long as they all see its tokens: ``tokens`` fit at least. ``spare``
    bytes of the device were available besides."""

    blocks: int
    block_size: int
    max_model_len: int
    nbytes: int
    sequences: float
    groups: int = 1
    spare: int = 0

    @property
    def tokens(self) -> int:
        return self.blocks // self.groups * self.block_size


def size_cache(
    config: EngineConfig,
    token_bytes: int,
    context: int | None,
    device: torch.device,
    state_bytes: int = 0,
    graph_bytes: int = 0,
    reaches: Sequence[Reach] = (Reach(),),
    longest_chunk: int | None = None,
) -> CacheSize:
    """Blocks for the KV cache. ``token_bytes`` is what one token takes in all layers (0 if all are recurrent), ``context``
    what the model was made for (``None``: it does not say), ``state_bytes`` and ``graph_bytes`` what recurrent layers and CUDA
    graphs take beside it. ``reaches`` and ``longest_chunk`` as in :func:`runtime.blocks.most_blocks`.

    Asked for by size: exactly that. Otherwise as much as ``max_num_seqs`` sequences of ``max_model_len`` can use, within
    ``mem_fraction_static`` (:data:`CACHE_FRACTION`) of the available memory. Raises :class:`LoadError` if ``max_model_len``
    was asked for and does not fit; if it was not, it is lowered to what fits.
    """
    block_bytes = config.block_size * token_bytes // len(reaches)

    def most(tokens: int) -> int:
        return most_blocks(tokens, config.block_size, reaches, longest_chunk)

    if context is not None and (config.max_model_len or 0) > context:
        raise LoadError(
            f"max_model_len {config.max_model_len} is more than the {context} positions that the model was made for."
        )
    available = available_bytes(device) - graph_bytes - state_bytes
    if available < 0:
        raise LoadError(
            f"The states of recurrent layers take {format_bytes(state_bytes)} for {config.max_num_seqs} sequences "
            f"(max_num_seqs), of {format_bytes(available + state_bytes)} available. Lower max_num_seqs."
            if state_bytes
            else f"CUDA graphs want {format_bytes(graph_bytes)}, and {format_bytes(available + graph_bytes)} are available. "
            "Lower max_num_seqs, or set disable_cuda_graph (--disable-cuda-graph)."
        )
    wanted = config.max_model_len or context or 4096
    if config.max_total_tokens is not None:
        blocks = config.max_total_tokens // config.block_size * len(reaches)
    elif config.kv_cache_memory is not None:
        blocks = parse_bytes(config.kv_cache_memory) // max(1, block_bytes)
    else:
        fraction = config.mem_fraction_static or CACHE_FRACTION
        blocks = min(config.max_num_seqs * most(wanted), int(available * fraction) // max(1, block_bytes))
    nbytes = blocks * block_bytes
    if blocks < most(1) or nbytes > available:
        tokens = blocks // len(reaches) * config.block_size
        raise LoadError(
            f"A KV cache of {tokens} tokens takes {format_bytes(nbytes)} ({token_bytes} bytes a token), "
            f"of {format_bytes(available)} available. At most {available // max(1, token_bytes)} tokens fit; "
            f"it needs room for one block of {config.block_size}."
        )
    # The longest sequence that fits; `most` never falls.
    capacity = bisect_right(range(1, wanted + 1), blocks, key=most)
    if config.max_model_len is not None and config.max_model_len > capacity:
        raise LoadError(
            f"max_model_len {config.max_model_len} needs {format_bytes(most(config.max_model_len) * block_bytes)} of KV "
            f"cache, but it has {blocks // len(reaches) * config.block_size} tokens ({format_bytes(nbytes)}). Lower "
            f"max_model_len to {capacity} or enlarge the cache."
        )
    sequences = blocks / most(capacity)
    return CacheSize(blocks, config.block_size, capacity, nbytes, sequences, len(reaches), available - nbytes)


def available_bytes(device: torch.device) -> int:
    """Free memory of a device; on a CPU what the system and the control group of this process leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [psutil.virtual_memory().available]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limits.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such control group, or "max"
    return max(0, min(limits))


def parse_bytes(size: int | str) -> int:
    """``2GiB``, ``500 MB``, ``1048576`` -> bytes. Raises :class:`LoadError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", str(size).strip().lower())
    if match is None:
        raise LoadError(f"{size!r} is not a size; write for example 2GiB, 500MB or a number of bytes.")
    return int(float(match[1]) * UNITS[match[2] or ""])


def format_bytes(size: int) -> str:
    """Bytes for people, in binary units."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
