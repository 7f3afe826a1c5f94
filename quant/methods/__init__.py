"""One file per checkpoint format; :mod:`quant.registry` finds them by name."""
