"""The exceptions nybble raises.

Every one is a :class:`NybbleError` and also the built-in class a caller would try first, so
``except ValueError`` and ``except FileNotFoundError`` work as expected. The extension module raises
the same classes: each error variant of the Rust core corresponds to one of them.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "ConfigError",
    "ContextError",
    "FileError",
    "FormatError",
    "LayoutError",
    "MissingFileError",
    "NybbleError",
    "TokenError",
    "UnsupportedError",
]


class NybbleError(Exception):
    """Base of every error raised by nybble."""


class FormatError(NybbleError, ValueError):
    """A file's bytes are damaged, hostile, or of a kind that is not read here."""


class ConfigError(NybbleError, ValueError):
    """A configuration contradicts itself or the tensors beside it."""


class UnsupportedError(NybbleError, NotImplementedError):
    """A well-formed request for something this version does not do."""


class ArgumentError(NybbleError, ValueError):
    """An argument is out of its range."""


class TokenError(NybbleError, IndexError):
    """A token id is not in the model's vocabulary."""


class ContextError(NybbleError, ValueError):
    """The tokens do not fit into the model's context."""


class LayoutError(NybbleError, TypeError):
    """Packed weights were handed to a kernel that reads another layout."""


class FileError(NybbleError, OSError):
    """The operating system refused to open, read, map, write or rename something."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder that is needed is not there."""
