"""What speculation is worth: the protocol of Spec-Bench (arXiv 2401.07851).

Every question of a file is answered greedily, turn by turn, once without speculation and once with
each way of drafting, one after the other, so that all share the machine's mood. Speed is new tokens
a second from the first new token on, with everything that drafting and choosing take; the speedup
of a category is the ratio of mean speeds, and the mean accepted tokens are new tokens a pass.
Answers must be the same token by token; where one is not, that is an error and no figure.

What differs from Spec-Bench: one run instead of three, and as many new tokens as asked for (theirs
are up to 1024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError, FormatError
from nybble.eval.text import read_rows

if TYPE_CHECKING:
    from nybble import _nybble
    from nybble.runtime import LanguageModel

__all__ = ["PLAIN", "Question", "measure_drafts", "read_questions"]

#: The way that all others are compared with.
PLAIN = "none"

_WARM_TOKENS = 24
#: Spec-Bench's first task is MT-bench, whose questions keep their own categories.
_MULTI_TURN = (
    *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
)


@dataclass(frozen=True)
class Question:
    """A question of one or several turns.

    Parameters
    ----------
    category
        The task it belongs to.
    turns
        What the user says, one text a turn.
    """

    category: str
    turns: tuple[str, ...]

    @property
    def task(self) -> str:
        """The category, or ``multi-turn`` for those of MT-bench."""
        return "multi-turn" if self.category in _MULTI_TURN else self.category


def read_questions(path: Path, per_task: int | None = None) -> list[Question]:
    """Read questions, one JSON object a line with ``category`` and ``turns``.

    Parameters
    ----------
    path
        A ``.jsonl`` or ``.jsonl.gz`` file in Spec-Bench's form.
    per_task
        Take only so many of each task, spread evenly over the file.

    Raises
    ------
    FormatError
        When a line is something else, or there is none.
    """
    tasks: dict[str, list[Question]] = {}
    for number, row in read_rows(path):
        category, turns = row.get("category"), row.get("turns")
        if (
            not isinstance(category, str)
            or not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn for turn in turns)
        ):
            message = f"{path}: line {number}: expected an object with category and turns"
            raise FormatError(message)
        question = Question(category, tuple(turns))
        tasks.setdefault(question.task, []).append(question)
    if not tasks:
        message = f"{path}: expected questions, found none"
        raise FormatError(message)
    if per_task is not None:
        tasks = {task: _spread(found, per_task) for task, found in tasks.items()}
    return [question for found in tasks.values() for question in found]


def _spread(questions: list[Question], count: int) -> list[Question]:
    count = min(count, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


@dataclass
class _Arm:
    """One way of drafting, and what it measured in one task."""

    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0
    computed: int = 0
    drafted: int = 0
    accepted: int = 0
    speeds: list[float] = field(default_factory=list)
    by_step: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    learn_seconds: float = 0.0

    def add(self, metrics: dict[str, Any]) -> None:
        """Add what one answer took."""
        draft = metrics["draft"] or {}
        seconds = metrics["decode_seconds"] + metrics["sample_seconds"]
        seconds += draft.get("draft_seconds", 0.0) + draft.get("learn_seconds", 0.0)
        if not metrics["decode_tokens"]:
            return
        self.tokens += metrics["decode_tokens"]
        self.seconds += seconds
        self.passes += metrics["decode_steps"]
        self.speeds.append(metrics["decode_tokens"] / seconds)
        self.drafted += draft.get("drafted_tokens", 0)
        self.accepted += draft.get("accepted_tokens", 0)
        self.draft_seconds += draft.get("draft_seconds", 0.0)
        self.learn_seconds += draft.get("learn_seconds", 0.0)
        steps = draft.get("tokens_by_step") or [metrics["decode_steps"]]
        self.by_step += [0] * (len(steps) - len(self.by_step))
        for place, count in enumerate(steps):
            self.by_step[place] += count

    def record(self, plain: _Arm) -> dict[str, Any]:
        """Return the figures beside those of plain decoding."""
        speed, base = _mean(self.speeds), _mean(plain.speeds)
        return {
            "answers": len(self.speeds),
            "tokens": self.tokens,
            "tokens_per_second": speed,
            "plain_tokens_per_second": base,
            "speedup": speed / base if base else None,
            "mean_accepted": self.tokens / self.passes if self.passes else None,
            "tokens_by_step": self.by_step,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "draft_share": self.draft_seconds / self.seconds if self.seconds else None,
            "learn_share": self.learn_seconds / self.seconds if self.seconds else None,
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def measure_drafts(
    model: LanguageModel,
    drafts: Sequence[str],
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 256,
    on_step: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Answer questions with and without speculation; return a record for each way and task.

    Parameters
    ----------
    model
        The model.
    drafts
        Ways of drafting as :func:`nybble.speculate.parse` reads them; plain decoding is always
        measured beside them.
    questions
        What to answer.
    max_new_tokens
        Most tokens of an answer.
    on_step
        Called before each question with its task, the questions done and the questions in all.

    Raises
    ------
    ArgumentError
        When there is nothing to measure.
    """
    ways = [PLAIN, *(way for way in dict.fromkeys(drafts) if way != PLAIN)]
    if len(ways) < 2 or not questions or max_new_tokens < 2:
        message = "bench: expected drafts, questions and at least 2 new tokens, found less"
        raise ArgumentError(message)
    chats = "default" in model.tokenizer.templates
    for way in ways:  # what a pass costs is measured here, outside of the time
        _answer(model, questions[0].turns[:1], way, _WARM_TOKENS, chats)
        if (shared := model.speculator(way)) is not None:
            shared.forget()
    arms: dict[tuple[str, str], _Arm] = {}
    for index, question in enumerate(questions):
        if on_step is not None:
            on_step(question.task, index, len(questions))
        expected: list[list[int]] | None = None
        # Each way has its turn to be the first.
        for way in (*ways[index % len(ways) :], *ways[: index % len(ways)]):
            answers, metrics = _answer(model, question.turns, way, max_new_tokens, chats)
            if expected is not None and answers != expected:
                message = f"{way}: expected the tokens of other ways, found others: a defect"
                raise ArgumentError(message)
            expected = answers
            for task in (question.task, "overall"):
                for answer in metrics:
                    arms.setdefault((way, task), _Arm()).add(answer)
    if on_step is not None:
        on_step("done", len(questions), len(questions))
    tasks = [*dict.fromkeys(question.task for question in questions), "overall"]
    return [
        {
            "draft": way,
            "task": task,
            **arms[way, task].record(arms[PLAIN, task]),
            "times": _times(model.speculator(way)),
            "max_new_tokens": max_new_tokens,
            "n_threads": model.info["threads"],
            "model_filename": str(model.path),
        }
        for way in ways
        for task in tasks
    ]


def _times(speculator: _nybble.Speculator | None) -> list[tuple[int, float]] | None:
    return None if speculator is None else speculator.times()


def _answer(
    model: LanguageModel, turns: Sequence[str], way: str, count: int, chats: bool
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Answer the turns of a question, and return the tokens and the metrics of each."""
    session = model.session()
    messages: list[dict[str, str]] = []
    tokens, metrics = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        if chats:
            stream = model.chat_stream(messages, count, session=session, draft=way)
        else:
            text = "\n\n".join(message["content"] for message in messages)
            stream = model.stream(text, count, session=session, draft=way)
        result = stream.result()
        messages.append({"role": "assistant", "content": result.text})
        tokens.append(result.tokens)
        metrics.append(result.metrics)
    return tokens, metrics
