"""TRIP: powers of two, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.quant.base import Floats, Scheme, within
from nybble.quant.fold import Fold, Pair, rounded_by_range

if TYPE_CHECKING:
    from nybble.calibrate.stats import InputStats

__all__ = ["Trip"]

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trip(Fold):
    """Activation channels are divided by powers of two that fit them to one common step.

    Paper: "Agile-Quant: Activation-Guided Quantization for Faster Inference of LLMs on the Edge",
    arXiv 2312.05693 (two-refine improved by pruning). The search of the exponents is that of
    FQ-ViT, arXiv 2111.13824 (powers-of-two factor).

    Formula, for the channels ``x_c`` of a layer's activations, ``b`` bits and the greatest exponent
    ``K``::

        s_K = max |x| / (2^(b-1) - 1)        the step that spans all channels
        s   = s_K / 2^K
        a_c = argmin over a in 0..K of || x_c - s 2^a clamp(round(x_c / (s 2^a))) ||^2

    Channel ``c`` is divided by ``2^(a_c)`` where it is made and its columns are multiplied by it
    where it is read, which is exact.

    Defaults: ``K`` up to 3, FQ-ViT's; the paper names no number and says that fewer outliers need
    less. Of ``0..K`` that greatest exponent is taken with which the outputs' error is least, of
    rounded inputs and rounded weights together: wide factors side by side in a group of weights
    cost those more than 8-bit inputs gain. Always ``K = 3`` took a model of 135M parameters from
    9.8 to 25.8 % above the perplexity of float, and 8-bit inputs without a fold to 10.5 %.
    ``share`` 0.1: where rounding the inputs costs less than that share of what rounding the weights
    costs, nothing is moved. On that model 8-bit inputs of 4-bit weights cost 0.03 to 3 % of it,
    4-bit inputs 1 to 4 times as much as the weights; factors chosen for the former help weights
    that are rounded to nearest, not GPTQ's (12.5 % with them, 10.5 % without). 4-bit inputs take a
    ``K`` of up to 8 in the shipped recipe: of 8-bit weights, 22.6 where 3 gives 23.5, no fold 31.3,
    and 8-bit inputs 17.3.

    What differs: the factors go into the producer as well as into the weights, so the run time
    divides nothing (the paper multiplies them into the weights and keeps the steps apart); steps
    are symmetric, as the run time's are, which takes them from each token, not the whole layer.
    Where it does, tokens count alike however large they are: a few, such as the first one, are a
    thousand times as large as others, and in squares nothing else would be seen (28.2 with them as
    they are, 26.3 so, 33.2 without a fold: 4-bit inputs, weights to nearest, 4096 tokens each to
    calibrate and to judge). Of groups of channels with steps of their own, the common step remains
    the layer's: one a group gave 28.6. Exponents are counted from the commonest one, which leaves
    most weights as they were. Tokens are not pruned here.
    """

    exponents: int = 3
    share: float = 0.1

    def __post_init__(self) -> None:
        within("trip: exponents", self.exponents, 1, 20, int)
        within("trip: share", self.share, 0, 1e6)

    @property
    def needs(self) -> frozenset[str]:
        """A sample of the activations."""
        return frozenset({"sample"})

    def factors(
        self,
        pair: Pair,
        weights: Sequence[Floats],
        inputs: InputStats,
        scheme: Scheme,
    ) -> npt.NDArray[Any]:
        """Return ``2^(a_c)``; see :meth:`nybble.quant.fold.Fold.factors`."""
        sample = _tokens(inputs, scheme)
        largest = float((inputs.largest if scheme.static else np.abs(sample)).max())
        if not weights:
            return self._factors(pair, sample, largest, scheme, self.exponents)
        best = np.ones(len(pair.rows))
        of_inputs, of_weights = _losses(best[pair.columns], weights, sample, scheme)
        if of_inputs < self.share * of_weights:
            return best
        least = of_inputs + of_weights
        for most in range(self.exponents + 1):
            factors = self._factors(pair, sample, largest, scheme, most)
            loss = sum(_losses(factors[pair.columns], weights, sample, scheme))
            if loss < least:
                best, least = factors, loss
        return best

    def _factors(
        self, pair: Pair, sample: Doubles, largest: float, scheme: Scheme, greatest: int
    ) -> npt.NDArray[Any]:
        """Search the exponents up to the greatest one."""
        top = 2 ** (scheme.activations - 1) - 1
        finest = largest / top / 2**greatest
        if finest <= 0:
            return np.ones(len(pair.rows))
        errors = []
        for exponent in range(greatest + 1):
            step = finest * 2**exponent
            rounded = np.clip(np.round(sample / step), -top, top) * step
            errors.append(pair.merged(np.square(sample - rounded).sum(axis=0), np.add))
        best = np.argmin(errors, axis=0)
        commonest = int(np.bincount(best).argmax())
        factors: npt.NDArray[Any] = np.exp2(best - commonest)
        return factors


def _tokens(inputs: InputStats, scheme: Scheme) -> Doubles:
    """Return the sample, each token divided by its size where it is to have a step of its own."""
    sample = inputs.sample.astype(np.float64)
    if scheme.static:
        return sample
    size = np.sqrt(np.square(sample).mean(axis=1, keepdims=True))
    size[size == 0] = 1
    return np.asarray(sample / size)


def _losses(
    factors: npt.NDArray[Any], weights: Sequence[Floats], sample: Doubles, scheme: Scheme
) -> tuple[float, float]:
    """Estimate the squared error of the outputs: of rounded inputs, and of rounded weights."""
    scaled_down = (sample / factors).astype(np.float32)
    rows, cols = scaled_down.shape
    whole = scheme.strategy != "group" or scheme.group is None
    groups = scaled_down.reshape(rows, 1 if whole else scheme.groups(cols), -1)
    over = (0, 2) if scheme.static else 2
    steps = np.abs(groups).max(axis=over, keepdims=True) / (2 ** (scheme.activations - 1) - 1)
    steps[steps == 0] = 1
    off = np.square(groups - np.round(groups / steps) * steps).reshape(rows, cols).mean(axis=0)
    size = np.square(scaled_down, dtype=np.float64).mean(axis=0)
    of_inputs = of_weights = 0.0
    for weight in weights:
        scaled = (weight * factors).astype(np.float32)
        of_inputs += float(off @ np.square(scaled, dtype=np.float64).sum(axis=0))
        lost = np.square(scaled - rounded_by_range(scaled, scheme), dtype=np.float64)
        of_weights += float(size @ lost.sum(axis=0))
    return of_inputs, of_weights
