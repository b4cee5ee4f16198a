"""What an image encoder is told about tokens: how patches are chosen, where, and how many stay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from nybble.errors import ArgumentError
from nybble.registry import Registry

__all__ = ["PatchMethod", "patch_settings"]


class PatchMethod(ABC):
    """A way to prune an image's tokens. Subclasses are frozen dataclasses of its settings.

    Each has ``layers``, the pruning layers counted from 0, and ``keep``, the share of the patches
    reaching such a layer that stays, one for all layers or one for each. How many stay does not
    depend on the image. Class, distillation and register tokens always stay.
    """

    layers: Sequence[int]
    keep: float | Sequence[float]

    @abstractmethod
    def method(self) -> dict[str, Any]:
        """Return the method as the core reads it."""

    def settings(self) -> dict[str, Any]:
        """Return the whole policy as the core reads it.

        Raises
        ------
        ArgumentError
            When layers or shares mean nothing.
        """
        layers, keep = self.layers, self.keep
        if (
            not isinstance(layers, (list, tuple))
            or not layers
            or not all(isinstance(layer, int) and layer >= 0 for layer in layers)
        ):
            message = f"tokens.layers: expected layers in ascending order, found {layers!r:.60}"
            raise ArgumentError(message)
        shares: list[Any] = list(keep) if isinstance(keep, (list, tuple)) else [keep] * len(layers)
        if not all(isinstance(share, (int, float)) and math.isfinite(share) for share in shares):
            message = f"tokens.keep: expected shares above 0 and at most 1, found {keep!r:.60}"
            raise ArgumentError(message)
        return {
            "method": self.method(),
            "layers": list(layers),
            "keep": [float(share) for share in shares],
        }


def patch_settings(
    tokens: PatchMethod | Mapping[str, Any] | str, methods: Registry[PatchMethod]
) -> dict[str, Any]:
    """Return a policy as the core reads it, from whatever names one.

    Parameters
    ----------
    tokens
        A method; its name; or a mapping with its ``name`` and its settings.
    methods
        The methods there are.

    Raises
    ------
    ArgumentError
        When a name or a value is not known.
    """
    if isinstance(tokens, PatchMethod):
        return tokens.settings()
    return methods.make(tokens, "tokens").settings()
