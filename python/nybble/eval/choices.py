"""Accuracy on multiple-choice questions, by the likelihood of each choice.

No text is generated. Each choice is scored as a continuation of the question, and the one with the
largest log-likelihood is the model's answer: its hits are ``acc``. For ``acc_norm`` the
log-likelihood is first divided by the number of characters of the choice, so that long choices are
not at a disadvantage. Both are as lm-evaluation-harness defines them, ties included: the first of
several best choices counts.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.eval.likelihood import Scorer, encode_pair
from nybble.eval.tasks import Item, Task, find, locate, read_items

if TYPE_CHECKING:
    from nybble.runtime import LanguageModel


@dataclass(frozen=True)
class Scored:
    """A question with the log-likelihood of each choice.

    Parameters
    ----------
    item
        The question.
    logprobs
        The choices' log-likelihoods in nats.
    greedy
        For each choice, whether all its tokens were the likeliest ones.
    computed
        Tokens the model computed for it.
    dropped
        Tokens left out on the left of the longest prompt, because the context holds no more.
    """

    item: Item
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    computed: int
    dropped: int

    @property
    def choice(self) -> int:
        """The likeliest choice."""
        return _largest(self.logprobs)

    @property
    def choice_norm(self) -> int:
        """The likeliest choice for its number of characters."""
        lengths = map(len, self.item.choices)
        return _largest(
            [value / length for value, length in zip(self.logprobs, lengths, strict=True)]
        )

    @property
    def hit(self) -> bool:
        """Whether the likeliest choice is right."""
        return self.choice == self.item.answer

    @property
    def hit_norm(self) -> bool:
        """Whether the likeliest choice for its number of characters is right."""
        return self.choice_norm == self.item.answer


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


@dataclass(frozen=True)
class Accuracy:
    """What a task measured.

    Parameters
    ----------
    task
        Its name.
    items
        Questions asked.
    acc, acc_stderr
        Share of hits from 0 to 1, and its standard error (``None`` for one question).
    acc_norm, acc_norm_stderr
        The same by log-likelihoods a character; ``None`` where that means nothing for the task.
    chance
        What guessing would hit.
    metric
        Which of ``"acc"`` and ``"acc_norm"`` stands for the task.
    truncated
        Questions that did not fit into the context and lost tokens on the left.
    tokens, seconds, tokens_per_second
        Tokens computed, the time for it (without loading), and the first by the second.
    """

    task: str
    items: int
    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    chance: float
    metric: str
    truncated: int
    tokens: int
    seconds: float
    tokens_per_second: float

    @property
    def value(self) -> float:
        """The figure that stands for the task."""
        return (
            self.acc_norm if self.metric == "acc_norm" and self.acc_norm is not None else self.acc
        )

    @property
    def stderr(self) -> float | None:
        """The standard error of :attr:`value`."""
        return self.acc_norm_stderr if self.metric == "acc_norm" else self.acc_stderr

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def score(model: "LanguageModel", items: Iterable[Item]) -> Iterator[Scored]:
    """Give the likelihoods of the choices, question by question.

    Raises
    ------
    ArgumentError
        If a choice has no tokens of its own.
    ContextError
        If a choice alone is longer than the model's context.
    FormatError
        If the model's logits are not finite.
    """
    scorer = Scorer(model)
    tokenizer = model.tokenizer
    for item in items:
        found = [
            scorer.score(*encode_pair(tokenizer, prompt, ending))
            for prompt, ending in zip(item.prompts, item.endings, strict=True)
        ]
        yield Scored(
            item,
            logprobs=tuple(part.logprob for part in found),
            greedy=tuple(part.greedy for part in found),
            computed=sum(part.computed for part in found),
            dropped=max(part.dropped for part in found),
        )


def accuracy(
    model: "LanguageModel",
    task: str | Task,
    data: str | Path | Sequence[Item] | None = None,
    *,
    limit: int | None = None,
    on_item: Callable[[int, int, float], None] | None = None,
) -> Accuracy:
    """Measure a model's accuracy on a task.

    Parameters
    ----------
    model
        Any model :func:`nybble.load` gives.
    task
        A name in :data:`nybble.eval.tasks.TASKS`, or a task.
    data
        Its questions: a ``.jsonl`` or ``.jsonl.gz`` file, or what :func:`read_items` made of one;
        without it, the file of that task in the folder ``NYBBLE_DATA`` names.
    limit
        Use only the first so many questions.
    on_item
        Called after each question with the number done, the number in all, and the accuracy so far.

    Raises
    ------
    ArgumentError
        If there is no such task, no file is known for it, or an argument is out of its range.
    FormatError
        If the file is not of the task's form, or the model's logits are not finite.
    """
    task = find(task) if isinstance(task, str) else task
    if data is None or isinstance(data, str | Path):
        data = read_items(task, locate(task) if data is None else data, limit)
    items = data[:limit]
    hits: list[bool] = []
    hits_norm: list[bool] = []
    tokens = truncated = 0
    start = time.perf_counter()
    for scored in score(model, items):
        hits.append(scored.hit)
        hits_norm.append(scored.hit_norm)
        tokens += scored.computed
        truncated += scored.dropped > 0
        if on_item is not None:
            shown = hits_norm if task.metric == "acc_norm" else hits
            on_item(len(shown), len(items), _mean(shown))
    seconds = time.perf_counter() - start
    return Accuracy(
        task=task.name,
        items=len(items),
        acc=_mean(hits),
        acc_stderr=_stderr(hits),
        acc_norm=_mean(hits_norm) if task.normalised else None,
        acc_norm_stderr=_stderr(hits_norm) if task.normalised else None,
        chance=math.fsum(1 / len(item.choices) for item in items) / len(items),
        metric=task.metric,
        truncated=truncated,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds > 0 else math.inf,
    )


def _mean(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _stderr(hits: Sequence[bool]) -> float | None:
    """Return the sample's standard deviation by the root of its size."""
    if len(hits) < 2:
        return None
    mean = _mean(hits)
    return math.sqrt(mean * (1 - mean) / (len(hits) - 1))
