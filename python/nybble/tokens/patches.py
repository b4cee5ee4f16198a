"""What an image encoder is told about tokens: how patches are chosen, where, and how many stay."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nybble.errors import ArgumentError

__all__ = ["PatchMethod", "patch_method"]


class PatchMethod(ABC):
    """A way to prune an image's tokens. Subclasses are frozen dataclasses of its settings.

    Each has ``layers``, the pruning layers counted from 0. How many patches stay does not depend on
    the image: of the ``p`` that reach such a layer ``ceil(keep (p - min(remove, p // 2)))``, where
    :meth:`budget` gives ``keep`` and ``remove``, each one number for all layers or one for each.
    Class, distillation and register tokens always stay.
    """

    layers: Sequence[int]

    @abstractmethod
    def budget(self) -> tuple[float | Sequence[float], int | Sequence[int]]:
        """Return the shares that stay, and how many patches leave for being like others."""

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
        layers = self.layers
        keep, remove = self.budget()
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
        counts: list[Any] = (
            list(remove) if isinstance(remove, (list, tuple)) else [remove] * len(layers)
        )
        if not all(isinstance(count, int) and 0 <= count < 1 << 32 for count in counts):
            message = f"tokens: expected whole numbers of patches to remove, found {remove!r:.60}"
            raise ArgumentError(message)
        return {
            "method": self.method(),
            "layers": list(layers),
            "keep": [float(share) for share in shares],
            "remove": [int(count) for count in counts],
        }


def patch_method(tokens: PatchMethod | Mapping[str, Any] | str | os.PathLike[str]) -> PatchMethod:
    """Return a method, from whatever names one.

    Parameters
    ----------
    tokens
        A method; its name; a mapping with its ``name`` and its settings; or the path of a JSON file
        with such a mapping, as ``nybble tune-tokens`` writes it.

    Raises
    ------
    ArgumentError
        When a name or a value is not known.
    NybbleError
        When the file cannot be read.
    """
    from nybble.tokens import PATCH_METHODS

    if isinstance(tokens, PatchMethod):
        return tokens
    if isinstance(tokens, os.PathLike) or (isinstance(tokens, str) and tokens.endswith(".json")):
        from nybble.runtime.files import MAX_CONFIG, read_json

        tokens = read_json(Path(tokens), MAX_CONFIG)
    return PATCH_METHODS.make(tokens, "tokens")
