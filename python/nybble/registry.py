"""Names for things: a fixed table, looked up, never imported from text.

A family of methods lists its classes in one call, one line a method::

    METHODS = Registry("quantization method", rtn=Rtn)

A name given twice is a syntax error there. An unknown name is an error that lists the nearest ones.
The table holds classes; whoever looks one up makes the instance, so nothing is shared by accident.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from nybble.errors import ArgumentError

__all__ = ["Registry", "unknown"]

T = TypeVar("T")


class Registry(Mapping[str, "type[T]"], Generic[T]):
    """A read-only table of named classes.

    Parameters
    ----------
    kind
        What the classes are, for messages.
    **classes
        The classes by name.
    """

    def __init__(self, kind: str, /, **classes: type[T]) -> None:
        self.kind = kind
        self._classes = dict(classes)

    def __getitem__(self, name: str) -> type[T]:
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def lookup(self, name: str) -> type[T]:
        """Return the class called `name`.

        Raises
        ------
        ArgumentError
            When there is none; the message lists the nearest names.
        """
        if name not in self._classes:
            raise ArgumentError(unknown(self.kind, name, self._classes))
        return self._classes[name]


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Word the complaint about a name that is not among the known ones.

    Parameters
    ----------
    kind
        What the name should have named.
    name
        What was given.
    known
        The names there are.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {kind} {str(name)!r}{meant} (known: {', '.join(names) or 'none'})"
