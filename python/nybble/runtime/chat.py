"""From messages to the text a model was trained on, without letting users write control tokens.

A chat template writes the model's control tokens (``<|im_start|>`` and the like) around the
messages. If a message itself contains the text ``<|im_end|>``, encoding the rendered text would
turn it into the control token, and whoever wrote the message could end their turn and speak as
somebody else. So every text of the messages is *marked* before it is rendered: inside each control
token's spelling, after its first character, a character is inserted that occurs nowhere else. The
template sees ordinary text (it can strip, split and compare it). After rendering, a spelling with
the mark inside is the user's and one without is the template's. The mark is then taken out again
and the text around it is encoded with control tokens switched off.

Roles are not marked, since templates build control tokens from them (``'<|' + role + '|>'``); they
must be short words instead.

The limit of the method: a template that deletes parts out of the middle of a message, or puts a
message's pieces together anew, can make a control token from pieces that were none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nybble.errors import ArgumentError, FormatError

__all__ = ["Marker", "render_messages"]

_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_MAX_DEPTH = 32
# Code points Unicode reserves for a program's internal use.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Marker:
    """Marks control tokens in users' text, and tells them from the template's afterwards.

    Parameters
    ----------
    control
        The spellings of the control tokens.
    """

    def __init__(self, control: Sequence[str]) -> None:
        # A token of one character has no inside. None is known; it would stay what it is.
        spellings = sorted((c for c in control if len(c) > 1), key=len, reverse=True)
        either = "|".join(map(re.escape, spellings))
        # A template may change the case of a text. Overlapping ones are found by the look-ahead.
        self._inside = re.compile(f"(?i:(?={either}))") if spellings else None
        self._split = re.compile(f"({either})") if spellings else None

    @staticmethod
    def choose(texts: Sequence[str]) -> str:
        """Choose a mark that none of `texts` contains."""
        free = [mark for mark in _MARKS if not any(mark in text for text in texts)]
        if not free:
            message = "messages: all of the characters U+FDD0 to U+FDEF occur; leave one out"
            raise ArgumentError(message)
        return free[0]

    def put(self, text: str, mark: str) -> str:
        """Return `text` with a mark inside every control token's spelling."""
        if self._inside is None:
            return text
        places = [match.start() + 1 for match in self._inside.finditer(text)]
        if not places:
            return text
        ends = [*places, len(text)]
        return mark.join(text[a:b] for a, b in zip([0, *places], ends, strict=True))

    def parts(self, rendered: str, mark: str) -> list[tuple[str, bool]]:
        """Split rendered text into runs, each with whether control tokens in it are meant."""
        if mark not in rendered or self._split is None:
            return [(rendered, True)]
        runs: list[tuple[str, bool]] = []
        trusted = ""
        for index, piece in enumerate(self._split.split(rendered)):
            if index % 2 == 0 and mark in piece:
                runs += [(trusted, True), (piece.replace(mark, ""), False)]
                trusted = ""
            else:
                trusted += piece
        runs.append((trusted, True))
        return [(text, meant) for text, meant in runs if text]


def _texts(value: object, out: list[str]) -> None:
    if isinstance(value, str):
        out.append(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _texts(key, out)
            _texts(item, out)
    elif isinstance(value, list | tuple):
        for item in value:
            _texts(item, out)


def _plain(value: object, name: str, put: Callable[[str], str], depth: int = 0) -> Any:
    """Rebuild `value` from plain types with marked texts: a template gets no other objects."""
    if depth > _MAX_DEPTH:
        message = f"{name}: expected at most {_MAX_DEPTH} levels of nesting"
        raise ArgumentError(message)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return put(str.__str__(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {
            _plain(key, name, put, depth + 1): _plain(item, name, put, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, name, put, depth + 1) for item in value]
    message = f"{name}: expected texts, numbers, lists and mappings, found {type(value).__name__}"
    raise ArgumentError(message)


def _check(messages: object) -> Sequence[Mapping[str, object]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        kind = type(messages).__name__
        message = f"messages: expected a list of mappings with 'role' and 'content', found {kind}"
        raise ArgumentError(message)
    if not messages:
        message = "messages: expected at least one message, found none"
        raise ArgumentError(message)
    for index, item in enumerate(messages):
        if not isinstance(item, Mapping) or "role" not in item:
            message = f"messages[{index}]: expected a mapping with 'role' and 'content'"
            raise ArgumentError(message)
        role = item["role"]
        if not isinstance(role, str) or not _ROLE.match(role):
            message = f"messages[{index}]: expected a role such as 'user', found {str(role)[:80]!r}"
            raise ArgumentError(message)
    return messages


def render_messages(
    source: str,
    messages: Sequence[Mapping[str, object]],
    *,
    where: str,
    marker: Marker,
    add_generation_prompt: bool,
    special: Mapping[str, str],
    extra: Mapping[str, object],
) -> tuple[str, str]:
    """Render `messages` through the template `source`.

    Parameters
    ----------
    source
        The template.
    messages
        Mappings with ``role`` and ``content``, and what else the template reads.
    where
        The file the template came from.
    marker
        What marks the users' text.
    add_generation_prompt
        Whether the text ends with the beginning of the assistant's turn.
    special
        The special tokens' names and spellings, ``bos_token`` and so on.
    extra
        Further variables of the template, ``tools`` for example.

    Returns
    -------
    tuple
        The text, with marks inside the users' control tokens, and the mark.
    """
    import jinja2  # here, because only chats need it

    from nybble.runtime import sandbox

    def same(text: str) -> str:
        return text

    plain = [
        _plain(item, f"messages[{index}]", same) for index, item in enumerate(_check(messages))
    ]
    plain_extra = {name: _plain(value, name, same) for name, value in extra.items()}
    texts = [source]
    _texts(plain, texts)
    _texts(plain_extra, texts)
    mark = marker.choose(texts)

    def put(text: str) -> str:
        return marker.put(text, mark)

    variables: dict[str, object] = dict(special)
    variables.update({name: _plain(value, name, put) for name, value in plain_extra.items()})
    variables["messages"] = [
        {**_plain(item, "messages", put), "role": item["role"]} for item in plain
    ]
    variables["add_generation_prompt"] = add_generation_prompt
    try:
        return sandbox.render(source, variables), mark
    except sandbox.RefusedError as error:
        message = f"messages: the chat template refuses them: {error}"
        raise ArgumentError(message) from None
    except sandbox.LimitError as error:
        message = f"{where}: chat template: {error}"
        raise FormatError(message) from None
    except jinja2.TemplateError as error:
        message = f"{where}: chat template: {error}"
        raise FormatError(message) from error
