"""What one quantized linear layer means: how its weight is stored, and what happens to its inputs. The key of kernel choice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WeightKind(Enum):
    """How one number is stored. ``NF4`` and ``FP4`` are bitsandbytes' two tables of 16 values, ``E2M1`` is the 4-bit float
    of the OCP microscaling formats and of NVFP4, ``FP8`` is e4m3fn."""

    INT2 = "int2"
    INT3 = "int3"
    INT4 = "int4"
    INT5 = "int5"
    INT6 = "int6"
    INT7 = "int7"
    INT8 = "int8"
    NF4 = "nf4"
    FP4 = "fp4"
    E2M1 = "e2m1"
    FP8 = "fp8"

    @property
    def bits(self) -> int:
        return int(self.value[-1]) if self.is_integer or self is WeightKind.FP8 else 4

    @property
    def is_integer(self) -> bool:
        return self.value.startswith("int")

    @property
    def has_table(self) -> bool:
        """The 16 values are stored with the weight."""
        return self in (WeightKind.NF4, WeightKind.FP4)

    @classmethod
    def integer(cls, bits: int) -> WeightKind:
        return cls(f"int{bits}")


class ScaleRule(Enum):
    """How the scale of dynamically quantized inputs follows from their largest magnitude (``quant/activation.py``)."""

    FLOAT = "float"
    POWER = "power of two"
    POWER_UP = "power of two, rounded up"
    LOCAL = "e4m3 under a stored global scale"


@dataclass(frozen=True)
class Activation:
    """How a layer's inputs are quantized when the model runs.

    ``group``: inputs of a token that share a scale, ``None`` is all of them; with ``whole``, all of all tokens that are
    multiplied together. ``static``: one scale for everything, stored
    (``QuantWeight.input_scale``). ``clamp``: magnitudes above it do not raise the scale. ``threshold``: LLM.int8, inputs of
    this magnitude and above are not quantized; 0 is none.
    """

    kind: WeightKind
    group: int | None = None
    static: bool = False
    symmetric: bool = True
    rule: ScaleRule = ScaleRule.FLOAT
    clamp: float | None = None
    threshold: float | None = None
    whole: bool = False

    @property
    def needs_scale(self) -> bool:
        """A scale is stored with the weight."""
        return self.static or self.rule is ScaleRule.LOCAL

    def __str__(self) -> str:
        where = "static" if self.static else f"per {self.group} inputs" if self.group else "per token"
        where = "per batch" if self.whole else where
        rule = "" if self.rule is ScaleRule.FLOAT else f", scale {self.rule.value}"
        outliers = f", outliers from {self.threshold:g} exact" if self.threshold else ""
        return f"{self.kind.value} {where}{rule}{outliers}" + ("" if self.symmetric else " asymmetric")


@dataclass(frozen=True)
class Scheme:
    """What one linear layer's weight means.

    ``block`` is ``(outputs, inputs)`` sharing one scale: a group of 128 is ``(1, 128)``, one scale a row ``(1, in)``, one for
    the whole weight ``(out, in)``. ``flat``: blocks of ``block[1]`` weights run on over the ends of rows. ``global_scale``: one
    more factor for the whole weight. ``activation``: ``None`` leaves the inputs alone.
    """

    kind: WeightKind
    block: tuple[int, int]
    zero_point: bool = False
    act_order: bool = False
    flat: bool = False
    global_scale: bool = False
    activation: Activation | None = None

    @property
    def group(self) -> int:
        """Inputs that share one scale."""
        return self.block[1]

    def __str__(self) -> str:
        outputs, inputs = self.block
        words = [self.kind.value, f"g{inputs}" if outputs == 1 else f"block {outputs}x{inputs}"]
        if self.flat:
            words.append("over row ends")
        if self.kind.is_integer:
            words.append("asymmetric" if self.zero_point else "symmetric")
        if self.act_order:
            words.append("act-order")
        return " ".join(words) + (f", inputs {self.activation}" if self.activation else "")
