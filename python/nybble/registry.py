"""Names for things: a fixed table, looked up, never imported from text.

A family of methods lists its classes in one call, one line a method::

    METHODS = Registry("quantization method", rtn=Rtn)

A name given twice is a syntax error there. An unknown name is an error that lists the nearest ones.
The table holds classes, frozen dataclasses of a method's settings. Users name one, alone or in a
mapping with settings (``{name: gptq, damping: 0.1}``), and :meth:`Registry.make` makes an instance.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from nybble.errors import ArgumentError

__all__ = ["Registry", "make", "unknown"]

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

    def make(self, named: object, where: str) -> T:
        """Return a method made from what names it.

        Parameters
        ----------
        named
            A name, or a mapping with the ``name`` and settings.
        where
            What is being set, for messages.

        Raises
        ------
        ArgumentError
            When the name or a setting is not known, or a setting is missing.
        """
        settings: dict[str, Any] = {}
        name = named
        if isinstance(named, Mapping):
            settings = dict(named)
            name = settings.pop("name", None)
        if not isinstance(name, str):
            message = f"{where}: expected a name, alone or in a mapping, found {named!r:.60}"
            raise ArgumentError(message)
        return make(self.lookup(name), settings, f"{where} {name}")


def make(kind: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Make a dataclass from a mapping, refusing what it does not have.

    Parameters
    ----------
    kind
        The dataclass.
    settings
        Its fields' values.
    where
        What is being made, for messages.

    Raises
    ------
    ArgumentError
        When a key is not known, or one without a default is missing.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # every method is one
    names = [field.name for field in fields if field.init]
    for key in settings:
        if key not in names:
            raise ArgumentError(unknown(f"key in {where}", key, names))
    for field in fields:
        defaults = (field.default, field.default_factory)
        if field.name not in settings and set(defaults) == {dataclasses.MISSING}:
            message = f"{where}.{field.name}: expected a value, found none"
            raise ArgumentError(message)
    return kind(**settings)


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
