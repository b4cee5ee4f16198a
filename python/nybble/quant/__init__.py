"""Quantization: one file a method, one line here for each.

A method turns a matrix of floats into integers and scales (:class:`~nybble.quant.base.Quantizer`);
what the integers may be is its :class:`~nybble.quant.base.Scheme`. How they are stored is the
business of :mod:`nybble.formats`. A fold (:class:`~nybble.quant.fold.Fold`) rescales channels
before that, without changing what the model computes; a tuning changes what is not an integer
after it.
"""

from __future__ import annotations

from nybble.quant.awq import Awq
from nybble.quant.base import IntWeights, Quantizer, Scheme
from nybble.quant.fold import Fold
from nybble.quant.gptq import Gptq
from nybble.quant.rtn import Rtn
from nybble.quant.scale_tuning import ScaleTuning
from nybble.quant.smoothquant import SmoothQuant
from nybble.quant.trip import Trip
from nybble.registry import Registry

__all__ = [
    "FOLDS",
    "METHODS",
    "TUNINGS",
    "Awq",
    "Fold",
    "Gptq",
    "IntWeights",
    "Quantizer",
    "Rtn",
    "ScaleTuning",
    "Scheme",
    "SmoothQuant",
    "Trip",
]

METHODS: Registry[Quantizer] = Registry(
    "quantization method",
    rtn=Rtn,
    gptq=Gptq,
)
"""Every method by the name recipes use."""

FOLDS: Registry[Fold] = Registry(
    "fold",
    awq=Awq,
    smoothquant=SmoothQuant,
    trip=Trip,
)
"""Every choice of channel factors by the name recipes use."""

TUNINGS: Registry[ScaleTuning] = Registry("tuning", scales=ScaleTuning)
"""Every tuning after rounding by the name recipes use."""
