"""nybble's own default: FLAP's choice of units, and a least squares fit of what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nybble.prune.compensate import Compensator, LeastSquares
from nybble.prune.flap import Flap

__all__ = ["Refit"]


@dataclass(frozen=True)
class Refit(Flap):
    """Units that FLAP would remove go, and the linears that read them are fitted anew.

    Paper: none; the choice of units is that of arXiv 2312.11983, the fit is the optimal brain
    surgeon's removal of columns.

    Formula: :class:`nybble.prune.compensate.LeastSquares` on the inputs as they are behind the
    layers already pruned, in place of FLAP's bias.

    Defaults: damping of 0.01, SparseGPT's. It is too little where tokens are few: on SmolLM2-135M
    with 4096 tokens of C4 and a fifth removed, perplexity on 8 windows of WikiText-2 was 40.8 with
    0.01, 37.6 with 0.1, and 37.4 with FLAP's bias. Give it more text than the wider of the linears
    has inputs, many times over. On DINOv2-S with 64 images, 16448 tokens, 0.001 to 0.1 are alike.

    Parameters
    ----------
    damping
        Share of the mean diagonal that is added to it.
    """

    compensate: str = "least_squares"
    damping: float = 0.01

    propagate: ClassVar[str] = "pruned"

    def __post_init__(self) -> None:
        super().__post_init__()
        LeastSquares(self.damping)

    @property
    def compensator(self) -> Compensator:
        """The fit."""
        if self.compensate == "least_squares":
            return LeastSquares(self.damping)
        return super().compensator
