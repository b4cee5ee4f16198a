"""Renders a chat template that may be hostile, within a budget of time and text.

A chat template is a program that came with the weights. jinja2's immutable sandbox keeps it away
from Python's internals and from changing what it is given; that alone does not stop it from running
for ever or from filling the memory. So everything a template can do in quantity is charged to a
:class:`_Budget`, which knows the time as well:

* every round of a loop and every call costs one unit, every text that is printed, joined, added or
  handed to a filter costs its length (nested lists and mappings: the sum of their parts);
* operations whose result can be far larger than their operands (``*``, ``**``, ``%``, ``replace``,
  ``join``, ``center``, ``indent`` and the like) are refused beforehand when the product of the
  operands' sizes is above `MAX_TEXT`.

What is not bounded: one single Python operation on operands of allowed size. With operands of at
most `MAX_TEXT` characters none of those takes longer than a fraction of a second.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["MAX_SECONDS", "MAX_SOURCE", "MAX_TEXT", "LimitError", "RefusedError", "render"]

MAX_SOURCE = 1 << 16
"""Characters of a template."""
MAX_TEXT = 1 << 24
"""Characters of the result, and of any text made on the way."""
MAX_UNITS = 1 << 27
"""Units of work of one rendering."""
MAX_SECONDS = 5.0
"""Time of one rendering."""

_CLOCK_EVERY = 256  # units between two looks at the clock
_AMPLIFIERS = frozenset(
    [
        *("batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust"),
        *("replace", "rjust", "slice", "tojson", "translate", "wordwrap", "zfill"),
    ]
)
_WIDE_FORMAT = re.compile(r"\d{5}|\*")


class LimitError(Exception):
    """A template used up its budget."""


class RefusedError(Exception):
    """A template called ``raise_exception``: it does not accept these messages."""


class _Budget:
    """Units and seconds that are left."""

    def __init__(self) -> None:
        self.units = MAX_UNITS
        self.until_clock = _CLOCK_EVERY
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self, units: int) -> None:
        self.units -= units
        self.until_clock -= units
        if self.units < 0:
            message = f"it does more than {MAX_UNITS} units of work"
            raise LimitError(message)
        if self.until_clock < 0:
            self.until_clock = _CLOCK_EVERY
            if time.monotonic() > self.deadline:
                message = f"it runs for more than {MAX_SECONDS:g} seconds"
                raise LimitError(message)

    def size(self, value: object) -> int:
        """Return the size of `value` and charge it."""
        total = 0
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str | bytes):
                size = len(item)
            elif isinstance(item, int):
                size = item.bit_length() // 3  # digits when printed
            else:
                size = 1
                if isinstance(item, Mapping):
                    waiting.extend(item.keys())
                    waiting.extend(item.values())
                elif isinstance(item, list | tuple | set | frozenset):
                    waiting.extend(item)
            self.spend(size + 1)
            total += size
        if total > MAX_TEXT:
            message = f"it makes a text of more than {MAX_TEXT} characters"
            raise LimitError(message)
        return total

    def check_amplifier(self, name: str, value: object, args: list[object]) -> None:
        """Refuse an operation whose result could be larger than `MAX_TEXT`."""
        size = max(self.size(value), 1)
        for arg in args:
            factor = abs(arg) if isinstance(arg, int) else self.size(arg)
            if size * factor > MAX_TEXT:
                message = f"{name} could make a text of more than {MAX_TEXT} characters"
                raise LimitError(message)


class _Instrument(NodeTransformer):
    """Sends loops and the ``~`` operator through the environment's charged methods."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._call("charged_loop", [node.iter], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("charged_concat", node.nodes, node.lineno)

    @staticmethod
    def _call(method: str, args: list[Any], line: int) -> nodes.Node:
        # An attribute of the environment, not a name: a template cannot put its own in its place.
        call = nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)
        return call.set_lineno(line)


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks text for training: printed as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """A namespace whose attributes cannot begin with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        for name in dict(*args, **kwargs):
            _check_attribute(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    # Not a method: a namespace's own attributes are those of the template.
    if isinstance(name, str) and name.startswith("_"):
        message = f"a namespace has no attribute {name!r}"
        raise SecurityError(message)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> None:
    raise RefusedError(str(message)[:1000])


def _strftime_now(form: str) -> str:
    if len(form) > 256:
        message = "strftime_now: the format is too long"
        raise LimitError(message)
    return datetime.now().astimezone().strftime(form)


class _Bounded(ImmutableSandboxedEnvironment):
    """The environment of one rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: _Budget) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, loopcontrols],
            finalize=self._charged_output,
            cache_size=0,
        )
        self.budget = budget
        self.filters["tojson"] = _tojson
        for name, function in list(self.filters.items()):
            self.filters[name] = self._charged_filter(name, function)
        self.globals.pop("lipsum", None)
        self.globals.update(
            dict=_dict,
            namespace=_SafeNamespace,
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return tree

    def charged_loop(self, iterable: Any) -> list[Any]:
        """Return the items of `iterable`, each of them charged."""
        items = []
        for item in iterable:
            self.budget.spend(1)
            items.append(item)
        return items

    def charged_concat(self, *parts: Any) -> str:
        """Join `parts` as the ``~`` operator does."""
        self.budget.size(parts)
        return "".join(map(str, parts))

    def _charged_output(self, value: Any) -> Any:
        self.budget.size(value)
        return value

    def _charged_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # Filters that want the context or environment get it as their first argument.
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            given = [*args[skip:], *kwargs.values()]
            if name in _AMPLIFIERS and given:
                self.budget.check_amplifier(name, given[0], given[1:])
                if name == "format":
                    _check_format(given[0])
            else:
                self.budget.size(given)
            return function(*args, **kwargs)

        return charged

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call on behalf of the template, charged."""
        budget = __self.budget
        budget.spend(1)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            name = getattr(__obj, "__name__", "")
            if name in _AMPLIFIERS:
                budget.check_amplifier(name, owner, [*args, *kwargs.values()])
            else:
                budget.size(owner)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Replace the methods ``format`` and ``format_map`` of a text."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        form: str = value.__self__

        def charged(*args: Any, **kwargs: Any) -> str:
            _check_format(form)
            self.budget.check_amplifier("format", form, [*args, *kwargs.values()])
            return inner(*args, **kwargs)

        return charged

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operation, charged."""
        if operator == "+":
            self.budget.spend(1)
            if not isinstance(left, int | float) or not isinstance(right, int | float):
                self.budget.size((left, right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            self.budget.check_amplifier("%", left, [right])
        elif operator in {"*", "**"}:
            self._check_product(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _check_product(self, operator: str, left: Any, right: Any) -> None:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if not numbers:
            text, count = (right, left) if isinstance(left, int) else (left, right)
            self.budget.check_amplifier(operator, text, [count])
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if bits > 4096:
                message = f"{operator} makes a number of more than 4096 bits"
                raise LimitError(message)


def _check_format(form: object) -> None:
    if _WIDE_FORMAT.search(str(form)):
        message = "a format with a width of more than 9999 characters"
        raise LimitError(message)


def _joined(pieces: Iterator[str], budget: _Budget) -> str:
    out = []
    total = 0
    for piece in pieces:
        total += len(piece)
        budget.spend(1)
        if total > MAX_TEXT:
            message = f"it writes more than {MAX_TEXT} characters"
            raise LimitError(message)
        out.append(piece)
    return "".join(out)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Render the template `source`.

    Parameters
    ----------
    source
        The template's text.
    variables
        What it may use: plain strings, numbers, lists and mappings only.

    Raises
    ------
    LimitError
        When it takes too long, or makes too much text.
    RefusedError
        When the template itself refuses the messages.
    jinja2.TemplateError
        When the template is wrong, or tries to leave the sandbox.
    """
    if len(source) > MAX_SOURCE:
        message = f"it has more than {MAX_SOURCE} characters"
        raise LimitError(message)
    budget = _Budget()
    try:
        return _joined(_Bounded(budget).from_string(source).generate(variables), budget)
    except (LimitError, RefusedError, TemplateError):
        raise
    except (RecursionError, MemoryError) as error:
        message = f"it is nested too deeply or too large ({type(error).__name__})"
        raise LimitError(message) from None
    except Exception as error:
        # What a template does wrong: adding a number to a text, dividing by zero, a bad index.
        message = f"{type(error).__name__}: {error}"
        raise TemplateError(message) from error
