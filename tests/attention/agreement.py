"""A backend against the reference, forward by forward, each over a poisoned cache of its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from attention import AttentionBackend, AttentionBatch, AttentionSpec
from attention.kv_cache import StaticScales
from attention.reference import ReferenceBackend
from tests.attention.paging import poisoned_cache, scattered_tables, tensors_of
from tests.attention.test_reference import BASE, Sequences

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

LENGTHS = [11, 1, 37, 18]
MIXED = [{2: 20, 0: 4}, {0: 1, 1: 1, 2: 1}, {3: 17, 0: 5, 2: 15}, {3: 1, 0: 1, 2: 1}]
"""Prompts in chunks, all decoding, and both together; some sequences rest."""

WIDE = {
    "dim-192-128": AttentionSpec(2, 2, 192, 128, scale=192**-0.5),
    "dim-256": replace(BASE, key_dim=256, value_dim=256, scale=1 / 16, softcap=2.0),
    "dim-576-512": AttentionSpec(20, 1, 576, 512, scale=576**-0.5),
    "latent-576-512": AttentionSpec(20, 1, 576, 512, scale=576**-0.5, latent=True),
    "group-7": AttentionSpec(14, 2, 16, 16, scale=0.25, window=9),
    "group-130": AttentionSpec(130, 1, 16, 16, scale=0.25),
}
WIDE_LENGTHS = [5, 1, 9, 7]
WIDE_STEPS = [{2: 6, 0: 4}, {0: 1, 1: 1, 2: 1}, {3: 7, 2: 1}]

QUANTIZED = (torch.float8_e4m3fn, torch.int8)


def agree_on_shared_keys(backend: AttentionBackend, device: torch.device, spec: AttentionSpec) -> None:
    """A call that shares attends to what another has stored, and stores nothing."""
    torch.manual_seed(0)
    sharing = replace(spec, shares=0)
    q, k, v = torch.randn(5, spec.heads, spec.key_dim), *torch.randn(2, 5, spec.kv_heads, spec.key_dim)
    results = []
    for each, place in ((ReferenceBackend(), torch.device("cpu")), (backend, device)):
        for specs in ([spec, sharing], [spec]):
            cache = poisoned_cache(specs, 8, 3, device=place)
            batch = AttentionBatch.pack([1, 4], [1, 4], [[2], [1, 0]], 3, place)
            sinks = None if not spec.sinks else torch.zeros(spec.heads, device=place)
            inputs = [tensor.to(place) for tensor in (q, k, v)]
            out = each.forward(0, spec, *inputs, batch, cache, sinks)
            if len(specs) > 1:
                poison = [torch.full_like(tensor, torch.nan) for tensor in inputs[1:]]
                out = each.forward(1, sharing, inputs[0], *poison, batch, cache, sinks)
            results.append(out.cpu())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=3e-6, atol=3e-6)


def agree(
    backend: AttentionBackend,
    device: torch.device,
    spec: AttentionSpec,
    model: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    block_size: int = 3,
    lengths: list[int] = LENGTHS,
    steps: list[dict[int, int]] = MIXED,
    static: str = "",
) -> None:
    """Every forward gives what the reference gives, and leaves the same bytes in the cache, poison included. ``static``: what
    has given scales, ``k``, ``v`` or both, another for each head; what is divided by the smallest of them saturates."""
    torch.manual_seed(0)
    sequences = Sequences.random(spec, lengths, model)
    sizes = ([spec] * 2, sum(lengths), block_size, stored or model)
    pairs = [(ReferenceBackend(), torch.device("cpu")), (backend, device)]
    caches = [poisoned_cache(*sizes, device) for _, device in pairs]
    for cache in caches if static else ():
        given = torch.linspace(0.002, 0.03, spec.kv_heads, device=cache.k[0].device)
        own = StaticScales(given if "k" in static else None, given.flip(0) if "v" in static else None)
        cache.static = [StaticScales(), own]
    tables = scattered_tables(lengths, caches[0])
    done = [0] * len(lengths)
    for step in steps:
        rows = [slice(done[s], done[s] + count) for s, count in step.items()]
        q, k, v = (
            torch.cat([tensors[s][part] for s, part in zip(step, rows, strict=True)])
            for tensors in (sequences.q, sequences.k, sequences.v)
        )
        for sequence, count in step.items():
            done[sequence] += count
        results = []
        for (each, device), cache in zip(pairs, caches, strict=True):
            plan = ([*step.values()], [done[s] for s in step], [tables[s] for s in step])
            batch = AttentionBatch.pack(*plan, block_size, device)
            sinks = None if sequences.sinks is None else sequences.sinks.to(device)
            inputs = (tensor.to(device) for tensor in (q, k, v))
            results.append(each.forward(1, spec, *inputs, batch, cache, sinks).cpu())
        wanted, got = results
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE[model], atol=TOLERANCE[model])
    for wanted, got in zip(*map(tensors_of, caches), strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), wanted.view(torch.uint8)), "the caches differ"
