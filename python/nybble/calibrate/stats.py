"""What is remembered of a linear's inputs: sums over the calibration tokens, never the tokens.

A method says what it needs by names (:data:`NEEDS`); every collector has the channel ranges. Sums
are kept in float64 and made in float32, a window at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.errors import FormatError

__all__ = ["NEEDS", "InputStats", "product"]

NEEDS = {
    "gram": "the second moments of the inputs",
    "magnitudes": "the mean magnitude of each channel",
    "reference": "the inputs the original model would have had",
    "sample": "some of the inputs themselves",
    "moments": "the mean and the variance of each channel",
}
"""What a method may need besides the ranges of the channels."""

_SAMPLE = 512  # rows kept by "sample"
_LARGEST = 1e15
_BLOCK = 256  # columns of a symmetric product at a time
_ROWS = 32  # in float64 at a time: all of a window would leave the caches, for 5 times the time

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class InputStats:
    """Statistics of the inputs ``X`` ``[tokens, cols]`` that some linears share.

    Parameters
    ----------
    name
        The first of those linears, for messages.
    cols
        Number of channels.
    needs
        Names in :data:`NEEDS`.

    Attributes
    ----------
    count
        Tokens seen.
    low, high
        Least and greatest value of each channel.
    absolute
        Sum of the magnitudes of each channel, with "magnitudes".
    gram
        ``X^T X``; the GPTQ literature's Hessian, up to a factor.
    drift
        ``(X_ref - X)^T X`` with the original model's inputs ``X_ref`` of the same tokens.
    average
        Mean of each channel, with "moments".
    scatter
        Sum of the squared distances of each channel from its mean, with "moments".
    derived
        What methods have computed from the sums, for the next linear that shares them.
    """

    def __init__(self, name: str, cols: int, needs: Collection[str] = ()) -> None:
        self.name = name
        self.needs = frozenset(needs)
        self.count = 0
        self.low = np.full(cols, np.inf, dtype=np.float32)
        self.high = np.full(cols, -np.inf, dtype=np.float32)
        self.absolute: Doubles = np.zeros(cols if "magnitudes" in self.needs else 0)
        self.gram: Doubles = np.zeros((cols, cols) if "gram" in self.needs else (0, 0))
        self.drift: Doubles = np.zeros((cols, cols) if "reference" in self.needs else (0, 0))
        moments = "moments" in self.needs
        self.average: Doubles = np.zeros(cols if moments else 0)
        self.scatter: Doubles = np.zeros(cols if moments else 0)
        self.derived: dict[Any, Any] = {}
        self._sample: list[Floats] = []

    def update(self, inputs: Floats, reference: Floats | None = None) -> None:
        """Add a window's inputs ``[tokens, cols]``.

        Raises
        ------
        FormatError
            When one is not finite, or absurdly large; the linear is named.
        """
        low, high = inputs.min(axis=0), inputs.max(axis=0)
        # Squares of larger ones are beyond float32.
        good = (low > -_LARGEST) & (high < _LARGEST)
        if not good.all():
            channel = int(np.argmin(good))
            found = low[channel] if not low[channel] > -_LARGEST else high[channel]
            message = f"calibration: {self.name}: expected finite inputs below {_LARGEST:g}, "
            message += f"found {found} in channel {channel}"
            raise FormatError(message)
        np.minimum(self.low, low, out=self.low)
        np.maximum(self.high, high, out=self.high)
        if "magnitudes" in self.needs:
            self.absolute += np.abs(inputs).sum(axis=0, dtype=np.float64)
        if self.gram.size:
            self.gram += _gram(inputs)
        if self.drift.size and reference is not None:
            self.drift += product((reference - inputs).T, inputs)
        if "sample" in self.needs:
            self._keep(inputs)
        if "moments" in self.needs and len(inputs):
            self._spread(inputs)
        self.count += len(inputs)

    def _keep(self, inputs: Floats) -> None:
        # Every window gives as many rows, evenly spread; the whole is thinned when it has grown.
        step = max(1, len(inputs) // 64)
        self._sample.append(inputs[::step].copy())
        if sum(len(part) for part in self._sample) > 2 * _SAMPLE:
            self._sample = [np.concatenate(self._sample)[::2].copy()]

    def _spread(self, inputs: Floats) -> None:
        # Chan, Golub and LeVeque: sums of squares about each part's own mean, so that a mean far
        # from zero costs no digits.
        more, before = len(inputs), self.count
        average = inputs.mean(axis=0, dtype=np.float64)
        scatter = np.zeros_like(average)
        for start in range(0, more, _ROWS):
            scatter += np.square(inputs[start : start + _ROWS] - average).sum(axis=0)
        shift = average - self.average
        self.average += shift * (more / (before + more))
        self.scatter += scatter + shift**2 * (before * more / (before + more))

    @property
    def variance(self) -> Doubles:
        """Variance of each channel; needs ``moments``."""
        return self.scatter / max(self.count, 1)

    @property
    def size(self) -> Doubles:
        """Euclidean norm of each channel's values; needs ``moments``."""
        return np.asarray(np.sqrt(self.scatter + self.count * np.square(self.average)))

    @property
    def sample(self) -> Floats:
        """Some of the inputs ``[at most 1024, cols]``."""
        return np.concatenate(self._sample)

    @property
    def largest(self) -> Floats:
        """Largest magnitude of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def mean(self) -> Doubles:
        """Mean magnitude of each channel; needs ``magnitudes``."""
        return self.absolute / max(self.count, 1)

    def energy(self, weights: Floats) -> float:
        """Return the sum of squares of what weights ``[rows, cols]`` give; needs ``gram``."""
        import torch

        rows = torch.from_numpy(weights)
        return float((rows @ torch.from_numpy(self.gram.astype(np.float32))).mul_(rows).sum())


def product(left: Floats, right: Floats) -> Floats:
    """Return ``left right``.

    torch's and not numpy's: the threads of the two libraries wait for each other busily, which cost
    a third of a whole calibration.
    """
    import torch

    found: Floats = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    return found


def _gram(inputs: Floats) -> Floats:
    """Return ``inputs^T inputs``."""
    cols = inputs.shape[1]
    found = np.empty((cols, cols), dtype=np.float32)
    for start in range(0, cols, _BLOCK):
        # What is left of the diagonal was computed above it.
        stop = min(start + _BLOCK, cols)
        part = product(inputs[:, start:stop].T, inputs[:, start:])
        found[start:stop, start:] = part
        found[start:, start:stop] = part.T
    return found
