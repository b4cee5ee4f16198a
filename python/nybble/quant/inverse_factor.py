"""The factor of an inverse that GPTQ's sweep runs on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.quant.base import Floats

__all__ = ["inverse_factor"]

Doubles = npt.NDArray[np.floating[Any]]


def inverse_factor(
    gram: Doubles, damping: float, order: npt.NDArray[np.int64] | None = None
) -> tuple[Floats, float]:
    """Return the upper Cholesky factor ``U`` of the inverse of a damped Gram matrix.

    Parameters
    ----------
    gram
        Second moments ``[cols, cols]``.
    damping
        Share of the mean diagonal that is added to it.
    order
        The order of rows and columns; ``None`` for the one they have.

    Returns
    -------
    tuple
        ``U`` with ``(gram + lambda)^-1 = U^T U``, and the damping it took.
    """
    if order is not None:
        gram = gram[np.ix_(order, order)]
    mean = float(np.diagonal(gram).mean())
    identity = np.eye(len(gram))
    while True:
        # H = R R^T with R upper, which is the lower factor of the matrix turned about; then
        # H^-1 = R^-T R^-1, so that U = R^-1 without inverting H itself.
        turned = (gram + damping * mean * identity)[::-1, ::-1]
        try:
            lower = np.linalg.cholesky(turned)
        except np.linalg.LinAlgError:
            damping = max(10 * damping, 1e-4)
            continue
        factor = _lower_inverse(lower)[::-1, ::-1].astype(np.float32)
        if np.isfinite(factor).all() and (np.diagonal(factor) > 0).all():
            return np.ascontiguousarray(np.triu(factor)), damping
        damping = max(10 * damping, 1e-4)


def _lower_inverse(lower: Doubles) -> Doubles:
    """Invert a lower triangular matrix by halves; numpy alone would not make use of the zeros."""
    size = len(lower)
    if size <= 64:
        small: Doubles = np.linalg.inv(lower)
        return small
    half = size // 2
    inverse = np.zeros_like(lower)
    first = inverse[:half, :half] = _lower_inverse(lower[:half, :half])
    last = inverse[half:, half:] = _lower_inverse(lower[half:, half:])
    inverse[half:, :half] = -(last @ (lower[half:, :half] @ first))
    return inverse
