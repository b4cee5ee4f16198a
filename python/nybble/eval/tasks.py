"""Multiple-choice tasks as data: where a row's question and choices are, and how they are asked.

The prompts are those of lm-evaluation-harness 0.4 without examples, so figures compare with it; its
names are the same but for ``siqa``, which it calls ``social_iqa``. A task reads JSON lines:

- ``{"question": ..., "choices": [...], "answer": 0}`` with a ``"passage"`` as well for BoolQ, and
  the answer counted from 0;
- HellaSwag and WinoGrande in the form in which they are published.

A new task is one entry of :data:`TASKS`.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nybble.errors import ArgumentError, FormatError, MissingFileError
from nybble.eval.text import read_rows
from nybble.registry import unknown

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question: texts whose likelihoods are compared.

    Parameters
    ----------
    prompts
        What stands before each choice's ending; mostly the same for all.
    endings
        What is scored behind each prompt, with the space it begins with.
    choices
        The choices as they were written, whose lengths normalise.
    answer
        Which one is right, from 0.
    """

    prompts: tuple[str, ...]
    endings: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """A multiple-choice task.

    Parameters
    ----------
    name
        What it is asked for by.
    source
        The data set's paper.
    read
        Makes an item of a row; raises :class:`ValueError` where the row is not of the form.
    file
        The data below the folder ``NYBBLE_DATA`` names, without ``.gz``; ``None`` if not known.
    metric
        The figure that stands for the task, ``"acc"`` or ``"acc_norm"``: the one papers on
        compression mostly state.
    normalised
        Whether ``acc_norm`` means anything for it.
    """

    name: str
    source: str
    read: Callable[[Row], Item]
    file: str | None = None
    metric: str = "acc"
    normalised: bool = True


def find(name: str) -> Task:
    """Return the task called ``name``.

    Raises
    ------
    ArgumentError
        If there is none; the message lists the nearest names.
    """
    if name not in TASKS:
        raise ArgumentError(unknown("task", name, TASKS))
    return TASKS[name]


def locate(task: Task) -> Path:
    """Return the task's file in the folder that ``NYBBLE_DATA`` names.

    Raises
    ------
    ArgumentError
        If no file is known for the task, or ``NYBBLE_DATA`` is not set.
    MissingFileError
        If the file is not there.
    """
    folder = os.environ.get("NYBBLE_DATA")
    if task.file is None or not folder:
        why = "no file is known for it" if task.file is None else "NYBBLE_DATA is not set"
        msg = f"task {task.name}: expected the data to be given, because {why}"
        raise ArgumentError(msg)
    plain = Path(folder) / task.file
    for path in (plain.with_name(plain.name + ".gz"), plain):
        if path.is_file():
            return path
    msg = f"{plain}: no such file, nor with .gz"
    raise MissingFileError(msg)


def read_items(task: Task, path: str | Path, limit: int | None = None) -> list[Item]:
    """Return the questions of a ``.jsonl`` or ``.jsonl.gz`` file.

    Parameters
    ----------
    task
        How the rows are read.
    path
        The file.
    limit
        Only the first so many.

    Raises
    ------
    FormatError
        If a line is not of the task's form, or there is none; the line and the field are named.
    ArgumentError
        If ``limit`` is less than one.
    """
    if limit is not None and limit < 1:
        msg = f"limit: expected at least 1, found {limit}"
        raise ArgumentError(msg)
    rows = islice(read_rows(path), limit)
    items = [_item(task, row, f"{path}: line {number}") for number, row in rows]
    if not items:
        msg = f"{path}: expected at least one question, found none"
        raise FormatError(msg)
    return items


def _item(task: Task, row: Row, where: str) -> Item:
    try:
        return task.read(row)
    except ValueError as error:
        msg = f"{where}: {error}"
        raise FormatError(msg) from error


def _asking(template: str) -> Callable[[Row], Item]:
    """Make the reader of rows with ``choices`` and ``answer``; ``{field}`` stands for a field."""
    fields = re.findall(r"{(\w+)}", template)

    def read(row: Row) -> Item:
        prompt = template.format(**{name: _text(row, name) for name in fields})
        choices = _choices(row, "choices")
        return _behind(prompt, choices, _index(row, "answer", len(choices)))

    return read


def _hellaswag(row: Row) -> Item:
    """Read ``activity_label``, ``ctx_a``, ``ctx_b``, ``endings`` and ``label``."""
    context = _text(row, "ctx_a") + " " + _text(row, "ctx_b").capitalize()
    choices = _choices(row, "endings", _clean)
    prompt = _clean(_text(row, "activity_label") + ": " + context)
    return _behind(prompt, choices, _index(row, "label", len(choices)))


def _clean(text: str) -> str:
    """Remove what WikiHow's pages left in HellaSwag: ``[title]``, ``[step]`` and double spaces."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(row: Row) -> Item:
    """Read ``sentence``, ``option1``, ``option2`` and ``answer``.

    The sentence up to its blank is the prompt, with either option filled in; what is scored is the
    rest of it, the same for both (partial evaluation; Trinh and Le, arXiv 1806.02847).
    """
    before, blank, behind = _text(row, "sentence").partition("_")
    if not blank or not behind.strip():
        msg = f"sentence: expected a blank, _, with text behind it, found {row['sentence']!r}"
        raise ValueError(msg)
    options = _text(row, "option1"), _text(row, "option2")
    answer = row.get("answer")
    if str(answer) not in ("1", "2"):
        msg = f'answer: expected "1" or "2", found {answer!r}'
        raise ValueError(msg)
    filled = tuple(before + option for option in options)
    return Item(filled, (" " + behind.strip(),) * 2, filled, int(str(answer)) - 1)


def _behind(prompt: str, choices: tuple[str, ...], answer: int) -> Item:
    endings = tuple(" " + choice for choice in choices)
    return Item((prompt,) * len(choices), endings, choices, answer)


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        found = f"{type(value).__name__}" if name in row else f"keys {sorted(row)}"
        msg = f"{name}: expected a text, found {found}"
        raise ValueError(msg)  # noqa: TRY004 - what is wrong is the file's content
    return value


def _choices(row: Row, name: str, clean: Callable[[str], str] = str) -> tuple[str, ...]:
    value = row.get(name)
    if not isinstance(value, list) or len(value) < 2:
        found = f"{len(value)}" if isinstance(value, list) else f"keys {sorted(row)}"
        msg = f"{name}: expected a list of at least 2 texts, found {found}"
        raise ValueError(msg)
    for index, choice in enumerate(value):
        if not isinstance(choice, str) or not clean(choice).strip():
            msg = f"{name}[{index}]: expected a text that is not empty, found {choice!r}"
            raise ValueError(msg)
    return tuple(map(clean, value))


def _index(row: Row, name: str, count: int) -> int:
    value = row.get(name)
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
        msg = f"{name}: expected the number of a choice, 0 to {count - 1}, found {value!r}"
        raise ValueError(msg)
    return number


#: The tasks by name.
TASKS = {
    task.name: task
    for task in (
        Task(
            "arc_easy",
            "AI2 Reasoning Challenge, easy set (Clark et al., arXiv 1803.05457)",
            _asking("Question: {question}\nAnswer:"),
            "qa/arc_easy_test.jsonl",
        ),
        Task(
            "arc_challenge",
            "AI2 Reasoning Challenge, challenge set (Clark et al., arXiv 1803.05457)",
            _asking("Question: {question}\nAnswer:"),
            "qa/arc_challenge_test.jsonl",
            "acc_norm",
        ),
        Task(
            "piqa",
            "Physical Interaction QA (Bisk et al., arXiv 1911.11641)",
            _asking("Question: {question}\nAnswer:"),
            "qa/piqa_valid.jsonl",
        ),
        Task(
            "boolq",
            "BoolQ (Clark et al., arXiv 1905.10044)",
            _asking("{passage}\nQuestion: {question}?\nAnswer:"),
            "qa/boolq_valid.jsonl",
        ),
        Task(
            "openbookqa",
            "OpenBookQA (Mihaylov et al., arXiv 1809.02789)",
            _asking("{question}"),
            "qa/openbookqa_test.jsonl",
            "acc_norm",
        ),
        Task(
            "siqa",
            "Social IQa (Sap et al., arXiv 1904.09728); the question holds its context",
            _asking("Q: {question}\nA:"),
            "qa/siqa_valid.jsonl",
        ),
        Task(
            "hellaswag",
            "HellaSwag (Zellers et al., arXiv 1905.07830), rows as published",
            _hellaswag,
            metric="acc_norm",
        ),
        Task(
            "winogrande",
            "WinoGrande (Sakaguchi et al., arXiv 1907.10641), rows as published",
            _winogrande,
            normalised=False,
        ),
    )
}
