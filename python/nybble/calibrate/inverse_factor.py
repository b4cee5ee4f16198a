"""The factor of an inverse that the sweeps of GPTQ and SparseGPT run on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.calibrate.stats import Floats

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
    import torch

    if order is not None:
        gram = gram[np.ix_(order, order)]
    mean = float(np.diagonal(gram).mean())
    matrix = torch.from_numpy(np.ascontiguousarray(gram, dtype=np.float64))
    identity = torch.eye(len(gram), dtype=torch.float64)
    while True:
        # H = R R^T with R upper, which is the lower factor of the matrix turned about; then
        # H^-1 = R^-T R^-1, so that U = R^-1 without inverting H itself. By torch, since numpy's
        # threads would make those of the calibration wait (`nybble.calibrate.stats`).
        turned = (matrix + damping * mean * identity).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            factor: Floats = inverse.flip(0, 1).to(torch.float32).numpy()
            if np.isfinite(factor).all() and (np.diagonal(factor) > 0).all():
                return np.ascontiguousarray(np.triu(factor)), damping
        damping = max(10 * damping, 1e-4)
