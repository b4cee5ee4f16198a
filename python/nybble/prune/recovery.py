"""What is trained after pruning, to bring back some of what was lost.

A recovery is given the pruned model as it was written, the original, and text; it returns tensors
that take the place of the pruned model's. Weights that a mask has taken out stay zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nybble.prune.base import number
from nybble.prune.evidence import Subject

__all__ = ["Patient", "Recovery"]

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Patient:
    """A pruned model beside its original.

    Parameters
    ----------
    pruned
        The model that is left.
    original
        The model before.
    layers
        Which layers of the original it has, rising.
    hidden
        Which channels of the residual stream it has; ``None`` for all.
    masks
        For models that lost single weights, by tensor: ``True`` where one stays.
    """

    pruned: Subject
    original: Subject
    layers: tuple[int, ...]
    hidden: npt.NDArray[np.int64] | None = None
    masks: Mapping[str, Bools] = field(default_factory=dict)

    def stays(self) -> dict[str, Bools]:
        """Return for each weight of the layers' linears what may change: all without a mask."""
        found = {}
        for linear in self.pruned.parts["linears"]:
            name = f"{linear['module']}.weight"
            if linear["role"] not in ("head", "project"):
                whole = np.ones(tuple(self.pruned.shapes[name]), dtype=bool)
                found[name] = self.masks.get(name, whole)
        return found


@dataclass(frozen=True)
class Recovery(ABC):
    """A way to recover. Subclasses are frozen dataclasses of their settings.

    Parameters
    ----------
    tokens
        Tokens of text it may read, rounded up to whole windows; other windows than the
        calibration's.
    context
        Tokens a window.
    """

    tokens: int = 32768
    context: int = 512

    def __post_init__(self) -> None:
        number("recovery.tokens", self.tokens, 1, 1 << 40, whole=True)
        number("recovery.context", self.context, 2, 1 << 20, whole=True)

    @abstractmethod
    def recover(
        self, patient: Patient, windows: npt.NDArray[np.int64], *, progress: bool = True
    ) -> dict[str, Floats]:
        """Return tensors of the pruned model that have changed, by name.

        Parameters
        ----------
        patient
            The model.
        windows
            Token ids ``[windows, context]``.
        progress
            Show a progress bar on stderr.

        Raises
        ------
        FormatError
            When a loss is not finite.
        """
