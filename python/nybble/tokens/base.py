"""What token reduction is told: the parts of a method, by name."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.errors import ArgumentError
from nybble.registry import make

__all__ = ["ACTIONS", "CRITERIA", "POSITIONS", "TokenMethod", "TokenPolicy", "settings", "to_json"]

CRITERIA = ("start", "received", "random")
POSITIONS = ("kept", "renumbered")
ACTIONS = ("drop", "4bit")

_MAX = (1 << 64) - 1


@dataclass(frozen=True)
class TokenPolicy:
    """Which tokens of a prompt are reduced, where and how.

    Parameters
    ----------
    ratio
        Share of a prompt's tokens that are gone behind the last pruning layer, at least 0 and
        below 1. With ``m`` pruning layers each removes ``1 - (1 - ratio)^(1/m)`` of what reaches
        it.
    criterion
        What makes a token worth keeping: ``"start"``, the probability it gives to the first token;
        ``"received"``, the mean probability it gets from the tokens that see it; ``"random"``. Sums
        over heads. The first token of a text and the last one of a prompt always stay.
    layers
        The pruning layers, ascending; ``None`` for six (in small models fewer), an eighth of the
        depth apart, from a quarter of it on. A layer's own keys and values are complete; its
        feed-forward part and all deeper layers do without what it drops, so in the last layer there
        is next to nothing to gain.
    positions
        Of the tokens that stay: ``"kept"`` as in the text, or ``"renumbered"`` in each layer.
        Models with ALiBi or sliding windows need the latter; to models with learned positions,
        which are added before the first layer, both are the same.
    action
        ``"drop"``, or ``"4bit"``: all tokens stay, but the inputs of the linears behind attention
        are rounded to 4 bits instead of 8 for those that score lowest.
    min_prompt
        Prompts of fewer tokens are left alone.
    seed
        Of the ``"random"`` criterion.
    """

    ratio: float
    criterion: str = "start"
    layers: Sequence[int] | None = None
    positions: str = "kept"
    action: str = "drop"
    min_prompt: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        ratio: object = self.ratio
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not number or math.isnan(self.ratio) or not 0 <= self.ratio < 1:
            message = f"tokens.ratio: expected a share of at least 0 and below 1, found {ratio!r}"
            raise ArgumentError(message)
        for name, accepted in (
            ("criterion", CRITERIA),
            ("positions", POSITIONS),
            ("action", ACTIONS),
        ):
            if (found := getattr(self, name)) not in accepted:
                message = f"tokens.{name}: expected one of {', '.join(accepted)}, found {found!r}"
                raise ArgumentError(message)
        for name in ("min_prompt", "seed"):
            found = getattr(self, name)
            if not _whole(found) or not 0 <= found <= _MAX:
                message = f"tokens.{name}: expected a whole number of at least 0, found {found!r}"
                raise ArgumentError(message)
        if self.layers is not None:
            object.__setattr__(self, "layers", _ascending(self.layers))

    def policy(self) -> TokenPolicy:
        """Return itself."""
        return self


class TokenMethod(ABC):
    """A paper's way to reduce tokens. Subclasses are frozen dataclasses of its settings."""

    @abstractmethod
    def policy(self) -> TokenPolicy:
        """Return the parts it is made of."""


def settings(
    tokens: TokenPolicy | TokenMethod | Mapping[str, Any] | str | None,
) -> dict[str, Any] | None:
    """Return a policy as a configuration says it (``nybble.run.tokens``), from whatever names one.

    Parameters
    ----------
    tokens
        A policy; a method; a mapping with the policy's keys; the name of a method in
        :data:`nybble.tokens.METHODS`, alone or in a mapping with its settings; or ``None``.

    Raises
    ------
    ArgumentError
        When a name or a value is not known.
    """
    if tokens is None:
        return None
    made: object = tokens
    if isinstance(tokens, Mapping) and "name" not in tokens:
        made = make(TokenPolicy, tokens, "tokens")
    elif isinstance(tokens, Mapping | str):
        from nybble.tokens import METHODS

        made = METHODS.make(tokens, "tokens")
    if not isinstance(made, TokenPolicy | TokenMethod):
        message = f"tokens: expected a TokenPolicy or a mapping, found {type(made).__name__}"
        raise ArgumentError(message)
    values = dataclasses.asdict(made.policy())
    if values["layers"] is not None:
        values["layers"] = list(values["layers"])
    return values


def to_json(tokens: TokenPolicy | TokenMethod | Mapping[str, Any] | str | None) -> str | None:
    """Return a policy as the core reads it; ``None`` leaves it to the model's folder.

    Parameters
    ----------
    tokens
        As for :func:`settings`, or ``"off"`` for no policy whatever the folder says.
    """
    if tokens is None:
        return None
    return "null" if tokens == "off" else json.dumps(settings(tokens))


def _ascending(layers: object) -> tuple[int, ...]:
    if isinstance(layers, list | tuple) and layers:
        found = tuple(layer for layer in layers if _whole(layer) and layer >= 0)
        if len(found) == len(layers) and found == tuple(sorted(set(found))):
            return found
    message = f"tokens.layers: expected layers in ascending order, found {layers!r:.60}"
    raise ArgumentError(message)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
