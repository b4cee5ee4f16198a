"""What is done to a linear that has lost inputs, so that its outputs change less.

A compensator sees the linear's weights, which inputs stay, and statistics of all its inputs as they
are when everything before it is pruned; it returns new weights, zero where an input went, and a
bias to add.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from nybble.calibrate.stats import InputStats
from nybble.errors import ArgumentError
from nybble.registry import Registry

__all__ = ["COMPENSATORS", "Bias", "Compensator", "LeastSquares", "Nothing"]

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class Compensator(ABC):
    """A way to make up for lost inputs. Subclasses are frozen dataclasses of their settings."""

    adds_bias: ClassVar[bool] = False
    """Whether linears that lose inputs have a bias afterwards."""

    @property
    def needs(self) -> frozenset[str]:
        """Names in :data:`nybble.calibrate.stats.NEEDS`."""
        return frozenset()

    @abstractmethod
    def fix(
        self, weights: Floats, stays: Bools, inputs: InputStats
    ) -> tuple[Floats, Floats | None]:
        """Return new weights ``[rows, cols]`` and a bias to add ``[rows]``, or ``None``.

        Parameters
        ----------
        weights
            The linear's weights before.
        stays
            Which inputs do ``[cols]``.
        inputs
            Statistics of its inputs.
        """


@dataclass(frozen=True)
class Nothing(Compensator):
    """Nothing: what went is missing."""

    def fix(
        self, weights: Floats, stays: Bools, inputs: InputStats
    ) -> tuple[Floats, Floats | None]:
        """See :meth:`Compensator.fix`."""
        return weights * stays, None


@dataclass(frozen=True)
class Bias(Compensator):
    """What the lost inputs gave on average is added as a bias (FLAP, arXiv 2312.11983).

    ``b = W_gone mean(x_gone)``: what is left of the error is the variance of the lost inputs.
    """

    adds_bias: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Means of the inputs."""
        return frozenset({"moments"})

    def fix(
        self, weights: Floats, stays: Bools, inputs: InputStats
    ) -> tuple[Floats, Floats | None]:
        """See :meth:`Compensator.fix`."""
        bias = weights[:, ~stays] @ inputs.average[~stays]
        return weights * stays, bias.astype(np.float32)


@dataclass(frozen=True)
class LeastSquares(Compensator):
    """The inputs that stay take over what can be foretold from them of those that went.

    With ``H`` the second moments of the inputs, damped by ``lambda = damping * mean(diag H)``::

        W_stay = W_stay + W_gone H_gone,stay (H_stay,stay + lambda)^-1

    the least squares fit to the old outputs, which equals the optimal brain surgeon's removal of
    whole columns. Ridge keeps it near the old weights, not near zero.

    Parameters
    ----------
    damping
        Share of the mean diagonal that is added to it, above 0.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.damping, bool) or not 0 < self.damping <= 10:
            message = f"damping: expected a number above 0 and at most 10, found {self.damping!r}"
            raise ArgumentError(message)

    @property
    def needs(self) -> frozenset[str]:
        """Second moments of the inputs."""
        return frozenset({"gram"})

    def fix(
        self, weights: Floats, stays: Bools, inputs: InputStats
    ) -> tuple[Floats, Floats | None]:
        """See :meth:`Compensator.fix`."""
        import torch

        out = weights * stays
        if stays.all() or not stays.any() or not inputs.gram.any():
            return out, None
        gram = torch.from_numpy(inputs.gram / inputs.count)
        here, gone = (torch.from_numpy(np.flatnonzero(which)) for which in (stays, ~stays))
        mean = float(gram.diagonal().mean())
        inner = gram[here][:, here]
        lost = torch.from_numpy(weights)[:, gone].double() @ gram[gone][:, here]
        # A singular matrix is damped more, as the paper's authors do for theirs.
        damping = self.damping
        while True:
            damped = inner + damping * mean * torch.eye(len(here), dtype=torch.float64)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                break
            damping *= 10
        out[:, stays] += torch.cholesky_solve(lost.T, factor).T.float().numpy()
        return out, None


COMPENSATORS: Registry[Compensator] = Registry(
    "compensator",
    none=Nothing,
    bias=Bias,
    least_squares=LeastSquares,
)
"""Every compensator by the name recipes use."""
