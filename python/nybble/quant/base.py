"""What quantization methods take and give.

A weight is stored as an unsigned code and read back as ``scale * (code - zero)``. Weights of one
row that stand side by side share a scale and a zero point; symmetric ones have the middle code (8
or 128) as their zero point and store none. The zero point of a group of 4-bit weights is a multiple
of 1/16, unless whole codes are asked for: rounding it to a whole code costs as much accuracy as
rounding the weights does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from nybble.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from nybble.calibrate.stats import InputStats

__all__ = ["GROUPS", "Floats", "IntWeights", "Quantizer", "Scheme", "within"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

GROUPS = (32, 64, 128)
"""Weights that may share a scale, besides a whole row."""

_CHUNK = 1 << 20  # weights compared at a time: what a core's cache holds


@dataclass(frozen=True)
class Scheme:
    """How a linear's weights and the activations that meet them are rounded.

    Parameters
    ----------
    bits
        Bits a weight: 4 or 8; or 7, symmetric codes that are stored as those of 8 bits are.
    group
        Weights of a row that share a scale; ``None`` for the whole row.
    symmetric
        Whether the zero point is the middle code.
    whole_zeros
        Whether zero points are whole codes where they could be sixteenths (asymmetric groups of
        4-bit weights). Then a weight of 0 stays 0.
    activations
        Bits of the activations: 8, 7 or 4, or 16 to leave them in float.
    strategy
        Of activations that are rounded: one scale a token (``"token"``) or one for each of its
        groups (``"group"``), which are the weights' groups; or one for all that a linear ever reads
        (``"tensor"``), found on calibration text and stored.
    """

    bits: int = 4
    group: int | None = 32
    symmetric: bool = False
    activations: int = 8
    strategy: str = "group"
    whole_zeros: bool = False

    def __post_init__(self) -> None:
        for name, found, accepted in (
            ("bits", self.bits, (4, 7, 8)),
            ("group", self.group, (*GROUPS, None)),
            ("activations", self.activations, (4, 7, 8, 16)),
            ("strategy", self.strategy, ("group", "token", "tensor")),
        ):
            if found not in accepted:
                message = f"{name}: expected one of {accepted}, found {found!r}"
                raise ArgumentError(message)
        if self.bits == 7 and not self.symmetric:
            message = "symmetric: expected True for 7-bit weights, found False"
            raise ArgumentError(message)
        # Equal schemes are to compare equal: the setting says nothing where it does not apply.
        applies = not self.symmetric and self.bits == 4 and self.group is not None
        object.__setattr__(self, "whole_zeros", self.whole_zeros and applies)

    def fitted(self, cols: int) -> Scheme:
        """Return the scheme for rows of `cols` weights.

        Where the group does not divide the row it is the largest smaller one that does, else the
        whole row.
        """
        if self.group is None or (cols and cols % self.group == 0):
            return self
        fitting = [group for group in GROUPS if group < self.group and cols and cols % group == 0]
        return replace(self, group=max(fitting, default=None))

    def groups(self, cols: int) -> int:
        """Return the number of groups in a row of `cols` weights."""
        return 1 if self.group is None else cols // self.group

    @property
    def stored_bits(self) -> int:
        """Bits of a code in a file."""
        return 8 if self.bits == 7 else self.bits

    @property
    def static(self) -> bool:
        """Whether the scale of the activations is stored with the weights."""
        return self.activations < 16 and self.strategy == "tensor"

    @property
    def zeros(self) -> str:
        """What a zero point may be: the ``middle`` code, a ``whole`` one, or ``sixteenths``."""
        if self.symmetric:
            return "middle"
        fractions = self.bits == 4 and self.group is not None and not self.whole_zeros
        return "sixteenths" if fractions else "whole"

    def describe(self) -> str:
        """Return the scheme in a few words."""
        group = "row" if self.group is None else str(self.group)
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits}-bit {kind}, group {group}"


@dataclass(frozen=True)
class IntWeights:
    """A matrix ``[rows, cols]`` as integers.

    Parameters
    ----------
    codes
        Unsigned codes ``[rows, cols]``.
    scales
        Scales ``[rows, groups]``, exactly representable in float16.
    zeros
        Zero points ``[rows, groups]`` in codes, whole or multiples of 1/16; ``None`` for symmetric
        weights.
    bits
        Bits of a code.
    note
        What was done otherwise than asked for, if anything.
    """

    codes: Codes
    scales: Floats
    zeros: Floats | None
    bits: int
    note: str = ""

    def dequantize(self, start: int = 0, stop: int | None = None) -> Floats:
        """Return rows `start` to `stop` as the floats they stand for."""
        codes, scales = self.codes[start:stop], self.scales[start:stop]
        rows, groups = scales.shape
        centred = codes.reshape(rows, groups, -1).astype(np.float32)
        # Codes less zero points are small multiples of 1/16: exact in float32.
        if self.zeros is None:
            centred -= np.float32(1 << (self.bits - 1))
        else:
            centred -= self.zeros[start:stop, :, None]
        centred *= scales[:, :, None]
        values: Floats = centred.reshape(codes.shape)
        return values

    def squared_error(self, weights: Floats) -> tuple[float, float]:
        """Return the sums of squares of ``weights - self`` and of ``weights``."""
        rows, cols = weights.shape
        step = max(1, _CHUNK // max(1, cols))
        error = norm = 0.0
        for start in range(0, rows, step):
            part = weights[start : start + step]
            difference = self.dequantize(start, start + step)
            np.subtract(part, difference, out=difference)
            error += float(np.square(difference, out=difference).sum(dtype=np.float64))
            norm += float(np.square(part, out=difference).sum(dtype=np.float64))
        return error, norm


def within(setting: str, value: Any, least: float, most: float, kind: type = float) -> None:
    """Refuse a method's setting that is not a number between two others.

    Raises
    ------
    ConfigError
        Naming the setting.
    """
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not (number and least <= value <= most):
        message = f"recipe: {setting}: expected {least} to {most}, found {value!r:.60}"
        raise ConfigError(message)


class Quantizer(ABC):
    """A way to choose the integers. Subclasses are frozen dataclasses of a paper's settings."""

    by_rows: ClassVar[bool] = True
    """Whether some of a matrix's rows may be handed over; not if a method looks across rows."""

    @property
    def needs(self) -> frozenset[str]:
        """What calibration has to collect of the inputs: names in :data:`nybble.calibrate.NEEDS`.

        A method that needs something is given the inputs of linears. Embeddings and heads are not
        calibrated: it has to round them without.
        """
        return frozenset()

    @property
    def stepwise(self) -> bool:
        """Whether `inputs` are to show what was rounded before in the same layer."""
        return False

    @abstractmethod
    def quantize(
        self,
        weights: Floats,
        scheme: Scheme,
        *,
        inputs: InputStats | None = None,
        threads: int | None = None,
    ) -> IntWeights:
        """Round a matrix.

        Parameters
        ----------
        weights
            The floats ``[rows, cols]``; with `by_rows`, possibly some of a matrix's rows.
        scheme
            What to round to, already fitted to the columns.
        inputs
            Statistics of what the matrix is multiplied by, if it was calibrated.
        threads
            Threads to use; ``None`` for the default. The result does not depend on it.
        """
