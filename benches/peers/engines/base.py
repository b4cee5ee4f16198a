"""What an engine has to offer to be measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar


class Unavailable(Exception):
    """The engine, or one of its formats, cannot run here; the text says why."""


@dataclass(frozen=True)
class Format:
    """One way an engine stores the weights.

    Parameters
    ----------
    name
        What the engine calls it.
    bits
        Bits of most weights, for the colour in the plot.
    about
        What the name does not say.
    """

    name: str
    bits: int
    about: str


class Session(ABC):
    """A loaded model. `prompt` and `generate` are timed; `reset`, called before each, is not."""

    #: Bytes of weights it keeps.
    weight_bytes: int

    @abstractmethod
    def reset(self) -> None:
        """Empty the context."""

    @abstractmethod
    def prompt(self, ids: list[int]) -> None:
        """Compute all tokens together, up to the logits of the last."""

    @abstractmethod
    def generate(self, ids: list[int]) -> None:
        """Compute the tokens one after the other, with logits every time."""


class Engine(ABC):
    """An engine; nothing of it is imported before it is used."""

    name: ClassVar[str]
    #: Packages whose versions name the engine's, the engine itself first.
    packages: ClassVar[tuple[str, ...]]
    formats: ClassVar[tuple[Format, ...]]
    #: What lies inside the clock, for the record.
    timed: ClassVar[str]

    def available(self) -> str:
        """Return the version.

        Raises
        ------
        Unavailable
            If the engine is not installed.
        """
        return installed(*self.packages)

    def fingerprint(self) -> str:
        """Return what a prepared model depends on; a new one makes it be prepared again."""
        return self.available()

    def needs_conversion(self, form: str) -> bool:
        """Say whether the format is made by `prepare`; else `open` gets the Hugging Face folder."""
        del form
        return True

    @abstractmethod
    def prepare(self, source: Path, form: str, target: Path) -> None:
        """Convert the Hugging Face folder `source` into the empty folder `target`."""

    @abstractmethod
    def open(self, model: Path, form: str, threads: int, context: int) -> Session:
        """Load a prepared model for contexts of at most `context` tokens."""


def installed(*packages: str) -> str:
    """Return the packages' versions: the bare first one, others in brackets.

    Raises
    ------
    Unavailable
        If one of them is missing.
    """
    try:
        found = [metadata.version(package) for package in packages]
    except metadata.PackageNotFoundError as error:
        message = f"the package {error.name} is not installed"
        raise Unavailable(message) from None
    others = [f"{name} {at}" for name, at in zip(packages[1:], found[1:], strict=True)]
    return f"{found[0]} ({', '.join(others)})" if others else found[0]


def file_bytes(folder: Path, *patterns: str) -> int:
    """Return the size of the folder's files of these patterns."""
    return sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))
