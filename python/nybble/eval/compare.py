"""Several models side by side: what each measures on the same text and the same questions.

One model is in memory at a time; two while the predictions of one are compared with those of the
reference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.anatomy import describe
from nybble.errors import ArgumentError
from nybble.eval.agreement import Agreement, agreement
from nybble.eval.choices import Accuracy, accuracy
from nybble.eval.perplexity import Perplexity, measure
from nybble.eval.tasks import Task, read_items
from nybble.eval.text import read_text
from nybble.runtime import load_language

if TYPE_CHECKING:
    from nybble.tokens import TokenMethod, TokenPolicy


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Parameters
    ----------
    name
        A short name, different from those of the others.
    path
        The model's folder or file.
    bytes_on_disk
        Size of its files.
    bits_per_weight
        Bits of storage a weight, scales included.
    perplexity
        On the text, if there was one.
    agreement
        With the reference on the text; ``None`` for the reference itself.
    accuracy
        On each task.
    """

    name: str
    path: Path
    bytes_on_disk: int
    bits_per_weight: float
    perplexity: Perplexity | None
    agreement: Agreement | None
    accuracy: tuple[Accuracy, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed in a second: of the text, or of the questions where there was no text."""
        if self.perplexity is not None:
            return self.perplexity.tokens_per_second
        seconds = sum(part.seconds for part in self.accuracy)
        return sum(part.tokens for part in self.accuracy) / seconds if seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return {**asdict(self), "path": str(self.path)}


def compare(
    paths: Sequence[str | Path],
    *,
    text: "str | Path | None" = None,
    tasks: Sequence[tuple[Task, Path]] = (),
    reference: str | Path | None = None,
    context: int = 1024,
    prompt_tokens: int = 1,
    max_tokens: int | None = None,
    limit: int | None = None,
    threads: int | None = None,
    kv: str | None = None,
    tokens: "TokenPolicy | TokenMethod | Mapping[str, Any] | str | None" = None,
    on_step: Callable[[str, str, int, int, str], None] | None = None,
) -> list[Measured]:
    """Measure models one after the other.

    Parameters
    ----------
    paths
        The models: folders or GGUF files.
    text
        A text, or a ``Path`` of a text file: perplexity is measured on it, and the agreement with
        the reference.
    tasks
        Tasks with the files of their questions.
    reference
        The model whose predictions are the measure, with the tokenizer of the others; ``None`` for
        no comparison.
    context, prompt_tokens, max_tokens
        The windows of the text, see :func:`nybble.eval.continuation`.
    limit
        Use only the first so many questions of each task.
    threads, kv, tokens
        As for :func:`nybble.load`. The reference keeps its keys and values, and the tokens of its
        prompts, as it does by default, so that a model compared with itself shows what another
        ``kv`` or policy does.
    on_step
        Called as things go on with the model's name, what it does (``"text"``, ``"agreement"`` or
        a task's name), how many tokens or questions are done, how many there are, and a remark.

    Raises
    ------
    NybbleError
        As the single measurements do. The text, the questions and the headers of all models are
        read before the first of them is measured.
    """
    if not paths:
        msg = "paths: expected at least one model, found none"
        raise ArgumentError(msg)
    places = [Path(path) for path in paths]
    facts = [describe(place) for place in places]
    content = read_text(text) if isinstance(text, Path) else text
    asked = [(task, read_items(task, data, limit)) for task, data in tasks]
    against = None if reference is None else Path(reference).resolve()
    names = short_names(places)

    def progress(name: str, what: str, word: str) -> Callable[[int, int, float], None]:
        def step(done: int, total: int, value: float) -> None:
            if on_step is not None:
                on_step(name, what, done, total, f"{word} {value:.3f}")

        return step

    found = []
    for name, place, fact in zip(names, places, facts, strict=True):
        model = load_language(place, threads, kv=kv, tokens=tokens)
        surprise, similar = None, None
        same = kv is None and tokens is None and place.resolve() == against
        if content is not None and against is not None and not same:
            similar = agreement(
                model,
                load_language(against, threads),
                content,
                context=context,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                on_window=progress(name, "agreement", "KL"),
            )
            surprise = similar.model
        elif content is not None:
            surprise = measure(
                model,
                content,
                context=context,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                on_window=progress(name, "text", "perplexity"),
            )
        scores = tuple(
            accuracy(
                model,
                task,
                items,
                on_item=progress(name, task.name, "accuracy"),
            )
            for task, items in asked
        )
        del model
        found.append(
            Measured(
                name=name,
                path=place,
                bytes_on_disk=fact["disk_bytes"],
                bits_per_weight=fact["bits_per_weight"],
                perplexity=surprise,
                agreement=similar,
                accuracy=scores,
            )
        )
    return found


def short_names(places: Sequence[Path]) -> list[str]:
    """Return the last parts of paths, as many as it takes to tell all of them apart."""
    parts = [place.resolve().parts for place in places]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len({tuple(part) for part in parts}):
            return names
    return [str(place) for place in places]
