"""Turns failures of the tokenizers library into nybble's own errors.

A crafted ``tokenizer.json`` can make that library panic, when it is loaded or only when it encodes
or decodes. A panic arrives in Python as ``pyo3_runtime.PanicException``, which derives from
``BaseException`` and so walks through every ``except Exception``. Here it becomes a
:class:`~nybble.errors.FormatError` like any other damage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nybble.errors import FormatError, NybbleError

__all__ = ["tokenizer_errors"]


def _is_panic(error: BaseException) -> bool:
    # Every extension module makes this class anew; it cannot be imported, only known by its name.
    return type(error).__name__ == "PanicException"


@contextmanager
def tokenizer_errors(where: str, doing: str) -> Iterator[None]:
    """Convert what the tokenizers library raises inside the block.

    Parameters
    ----------
    where
        The file the tokenizer came from.
    doing
        What was being done, for the message.

    Raises
    ------
    FormatError
        For every error and panic of the library; nybble's own errors and requests to stop pass.
    """
    try:
        yield
    except NybbleError:
        raise
    except Exception as error:
        message = f"{where}: {doing}: {error}"
        raise FormatError(message) from error
    except BaseException as error:
        if not _is_panic(error):
            raise
        message = f"{where}: {doing}: the tokenizer is damaged ({error})"
        raise FormatError(message) from None
