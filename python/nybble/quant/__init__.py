"""Quantization: one file a method, one line here for each.

A method turns a matrix of floats into integers and scales (:class:`~nybble.quant.base.Quantizer`);
what the integers may be is its :class:`~nybble.quant.base.Scheme`. How they are stored is the
business of :mod:`nybble.formats`.
"""

from __future__ import annotations

from nybble.quant.base import IntWeights, Quantizer, Scheme
from nybble.quant.rtn import Rtn
from nybble.registry import Registry

__all__ = ["METHODS", "IntWeights", "Quantizer", "Rtn", "Scheme"]

METHODS: Registry[Quantizer] = Registry(
    "quantization method",
    rtn=Rtn,
)
"""Every method by the name recipes use."""
