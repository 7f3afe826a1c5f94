"""Formats and kernels of other packages, by entry points, imported only when they are asked.

An installed package may be broken. It is then known by name, with the error, and raises only when it is asked for: other
checkpoints and kernels work as if it were not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points

METHODS = "relinear.quant_methods"
"""The group of entry points whose values are subclasses of :class:`quant.base.QuantMethod`."""
KERNELS = "relinear.kernels"
"""The group whose values are subclasses of :class:`quant.base.LinearKernel`."""


@dataclass(frozen=True)
class Plugin:
    """One entry point. ``wanted`` is the class that it must be a subclass of."""

    point: EntryPoint
    wanted: type

    def __str__(self) -> str:
        found = self.point.dist
        return f"{self.point.name} ({f'{found.name} {found.version}' if found else self.point.value})"

    @cached_property
    def found(self) -> type | str:
        """The class, or why there is none; imported once."""
        try:
            value = self.point.load()
        except Exception as error:  # whatever a stranger's module raises while it is imported
            return f"{self} cannot be imported ({self.point.value}): {type(error).__name__}: {error}"
        if not (isinstance(value, type) and issubclass(value, self.wanted)):
            return f"{self}: {self.point.value} is no subclass of {self.wanted.__module__}.{self.wanted.__name__}"
        return value


@cache
def installed(group: str, wanted: type) -> Mapping[str, Plugin]:
    """The plugins of a group by name, imported by nobody yet. Of two packages with one name the first found counts."""
    plugins: dict[str, Plugin] = {}
    for point in entry_points(group=group):
        plugins.setdefault(point.name, Plugin(point, wanted))
    return dict(sorted(plugins.items()))
