"""How to speculate, and what users write for it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from nybble.errors import ArgumentError

__all__ = ["SOURCES", "DraftLike", "Drafts", "parse"]

#: Where drafts may come from.
SOURCES = ("recycle", "pairs", "ngram", "suffix", "retrieval", "model", "random")

_OFF = ("off", "none")


@dataclass(frozen=True)
class Drafts:
    """Where drafts come from, and how many of them are computed.

    The model computes drafted tokens beside the next one in a single pass, and those that it
    chooses anyway are kept. The result is the same, token by token, with every setting; only the
    speed differs. Unless a number of nodes or a template is given, the engine measures once what
    computing several tokens costs with this model on this machine, keeps count of which drafts turn
    out right, and in each step computes as many as promise the most tokens a second, or none.

    Parameters
    ----------
    sources
        ``recycle`` is Token Recycling ("Turning Trash into Treasure", arXiv 2408.08696): what the
        model held for likely after the same token before, whether it was right or not;
        ``pairs`` is the same by the last two tokens. ``suffix``
        copies what followed the longest match of the last tokens in the conversation
        (arXiv 2411.10666), ``ngram`` what followed the last three, two or one. ``retrieval`` copies
        from a datastore of text (RASD, arXiv 2503.03434) made with ``nybble index``. ``model`` asks
        a small model of the same vocabulary. ``random`` drafts at random, as a control.
    k
        Candidates of a token that recycling keeps; 8 is the paper's.
    start
        ``"hot"``: a text finds what earlier ones left (the paper's way); ``"cold"``: nothing.
    nodes
        Compute the likeliest so many drafts in every step, whether it pays or not.
    template
        Compute this tree of recycled drafts in every step: ``"paper"`` for the paper's 80 nodes, or
        numbers of children in breadth-first order.
    matrix
        File with what recycling learned, written by ``LanguageModel.save_drafts``.
    index
        The datastore of ``retrieval``.
    model
        The folder of ``model``.

    Raises
    ------
    ArgumentError
        When a setting is of the wrong kind; what it means is checked by the core.
    """

    sources: tuple[str, ...] = ("suffix", "pairs", "recycle")
    k: int = 8
    start: str = "hot"
    nodes: int | None = None
    template: str | tuple[int, ...] | None = None
    matrix: str | None = None
    index: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        """Check what the core could not read."""
        if not self.sources or any(source not in SOURCES for source in self.sources):
            message = f"draft: expected some of {', '.join(SOURCES)}, found {self.sources!r}"
            raise ArgumentError(message)
        if self.start not in ("hot", "cold"):
            message = f"draft.start: expected 'hot' or 'cold', found {self.start!r}"
            raise ArgumentError(message)

    def to_json(self) -> str:
        """Return the settings as the core reads them."""
        values = asdict(self)
        for name in ("matrix", "index", "model"):
            if values[name] is not None:
                values[name] = os.fspath(values[name])
        return json.dumps(values)


DraftLike: TypeAlias = Drafts | Mapping[str, Any] | Sequence[str] | str | bool | None
"""What :func:`parse` reads."""


def parse(draft: object) -> Drafts | None:
    """Return the settings that users' ways of writing them mean; ``None`` for no speculation.

    Parameters
    ----------
    draft
        ``"auto"``, ``True`` or ``None`` for the defaults; ``"off"``, ``"none"`` or ``False`` for
        none; sources with commas or plus signs between (``"recycle,ngram"``), behind which a colon
        may name the tree (``"recycle:paper"``, ``"recycle:8"``), or a sequence of sources; a
        mapping with the fields of :class:`Drafts`; or one.

    Raises
    ------
    ArgumentError
        When it is nothing of this.
    """
    if draft is None or draft is True or draft == "auto":
        return Drafts()
    if draft is False or draft in _OFF:
        return None
    if isinstance(draft, Drafts):
        return draft
    if isinstance(draft, str):
        names, _, tree = draft.partition(":")
        sources = tuple(part.strip() for part in names.replace("+", ",").split(","))
        if not tree:
            return Drafts(sources)
        if tree.isdecimal():
            return Drafts(sources, nodes=int(tree))
        return Drafts(sources, template=tree)
    if isinstance(draft, Mapping):
        known = {field.name for field in fields(Drafts)}
        if unknown := [str(key) for key in draft if key not in known]:
            message = f"draft: expected {', '.join(sorted(known))}, found {', '.join(unknown)}"
            raise ArgumentError(message)
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in draft.items()
        }
        if isinstance(values.get("sources"), str):
            values["sources"] = (values["sources"],)
        return Drafts(**values)
    if isinstance(draft, Sequence):
        return Drafts(tuple(draft))
    message = f"draft: expected settings of speculation, found {type(draft).__name__}"
    raise ArgumentError(message)
