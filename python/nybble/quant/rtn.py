"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble import _nybble
from nybble.quant.base import Floats, IntWeights, Quantizer, Scheme

if TYPE_CHECKING:
    from nybble.calibrate.stats import InputStats

__all__ = ["Rtn"]


@dataclass(frozen=True)
class Rtn(Quantizer):
    """Every weight to the nearest step of the group's best scale; needs no calibration data.

    Paper: none; the baseline every paper on quantization compares with. The choice of the scale by
    least squared error is old practice (Lloyd's iteration on a uniform grid).

    Formula, for the weights ``w_1 .. w_n`` of a group::

        q_i = clamp(round(w_i / s + z), 0, 2^bits - 1)
        s, z = argmin sum_i (w_i - s (q_i - z))^2

    with ``z = 2^(bits-1)`` for symmetric groups, else a whole code or (4 bits) a multiple of 1/16,
    and ``s`` among the values of float16.

    Defaults: none. The candidates for ``s`` are fixed in the core (``solve/rtn.rs``): a grid of
    clipped ranges, each refined by ``s = sum w_i c_i / sum c_i^2`` for fixed ``c_i = q_i - z``.

    What differs from the textbook ``s = max|w| / (2^(bits-1) - 1)``: never worse. For Gaussian
    weights in groups of 32 at 4 bits it leaves a fifth less squared error, a tenth less where both
    have zero points; on real weights that is within 0.3 % of the best scale there is.
    """

    def quantize(
        self,
        weights: Floats,
        scheme: Scheme,
        *,
        inputs: InputStats | None = None,  # not looked at
        threads: int | None = None,
    ) -> IntWeights:
        """Round `weights`; see :meth:`nybble.quant.base.Quantizer.quantize`."""
        group = weights.shape[1] if scheme.group is None else scheme.group
        codes, scales, zeros = _nybble.rtn(weights, scheme.bits, group, scheme.zeros, threads)
        return IntWeights(codes, scales, zeros, scheme.bits)
