"""What loading held against what the plan said it would."""

from __future__ import annotations

from quant.kernels import held_bytes
from quant.linear import QuantLinear
from runtime.loader import LoadedModel


def assert_bytes_as_planned(loaded: LoadedModel) -> None:
    """To the byte for every quantized layer; less where its values turned out simpler than the headers can tell (an order that
    is none, zero points that are all in the middle), and for siblings, who share what fills their tiles up."""
    layers = {name: layer for name, layer in loaded.model.named_modules() if isinstance(layer, QuantLinear)}
    assert len(layers) == len(loaded.plan.quantized) > 0
    for name, layer in layers.items():
        planned, held = loaded.plan.modules[name], layer.quant_weight
        if layer.siblings is not None:
            continue
        assert held is not None
        if held.scheme == planned.scheme:
            assert planned.nbytes == held.nbytes, f"{name}: {held.scheme} by {layer.kernel.name}"
        else:
            assert held.nbytes < planned.nbytes, f"{name}: {held.scheme}, not {planned.scheme}"
    for names in loaded.plan.siblings:
        joined = [layers[name] for name in names if name in layers]
        if joined and joined[0].siblings is not None:
            first, held = joined[0], joined[0].quant_weight
            assert held is not None
            assert all(other.quant_weight is None for other in joined[1:])
            assert held.nbytes <= sum(loaded.plan.modules[name].nbytes for name in names)
            assert held.nbytes == held_bytes(first.kernel, held.scheme, held.shape, held.scale.dtype)
