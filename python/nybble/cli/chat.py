"""``nybble chat``: a conversation.

The history is kept, and so is the key-value cache: an answer costs only the tokens that are new
since the last one.
"""

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import options

if TYPE_CHECKING:
    from nybble.cli.sampling import Choice
    from nybble.runtime import LanguageModel, Session

_TEMPERATURE = 0.3
_TOP_P = 0.9
_REPEAT_PENALTY = 1.1

_HELP = """\
/reset   forget the conversation
/exit    leave (so does Ctrl-D)
/help    this text
Ctrl-C stops an answer. A message that begins with a slash is sent with two slashes."""


def chat(
    model: options.ModelArgument,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="System message.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--max-tokens",
            min=1,
            help="Most new tokens an answer; without it 256, or as many as the context holds.",
            show_default=False,
        ),
    ] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    context: options.ContextLimit = None,
    threads: options.Threads = None,
    kv: options.Kv = None,
    draft: options.Draft = "auto",
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Talk with a model.

    Messages are read line by line, from the terminal or from a pipe. /reset forgets the
    conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer. Where nothing else is asked for,
    the temperature is 0.3, top-p 0.9 and the repeat penalty 1.1: always taking the likeliest token
    makes small models repeat themselves. With --json the whole conversation is printed as one
    object at the end.
    """
    import nybble.runtime
    from nybble.cli import output, sampling
    from nybble.errors import UnsupportedError

    language_model = nybble.runtime.load_language(
        options.open_path(model), threads, context=context, kv=kv, draft=options.drafts(draft)
    )
    if "default" not in language_model.tokenizer.templates:
        msg = (
            f"a conversation with {language_model.path}: the model has no chat template; "
            "`nybble run` continues a text"
        )
        raise UnsupportedError(msg)
    talk = _Talk(
        language_model,
        language_model.session(),
        sampling.Choice(
            _TEMPERATURE if temperature is None else temperature,
            top_k,
            _TOP_P if top_p is None else top_p,
            min_p,
            _REPEAT_PENALTY if repeat_penalty is None else repeat_penalty,
            seed,
        ),
        max_tokens,
        system,
        show=not as_json,
        notes=not (quiet or as_json),
    )
    talk.reset()
    lines = _Lines(talk.notes)
    if talk.notes and lines.terminal:
        output.note(f"{language_model.path}: /help lists the commands, Ctrl-D leaves")
    while True:
        try:
            line = lines.next()
        except KeyboardInterrupt:
            if not lines.terminal:
                raise
            output.note("\n(Ctrl-D or /exit leaves)")
            continue
        if line is None or line.strip() == "/exit":
            break
        try:
            _obey(talk, line)
        except KeyboardInterrupt:
            if not lines.terminal:
                raise
            talk.stopped()
    if as_json:
        output.emit_json(
            {
                "model": str(language_model.path),
                "messages": talk.messages,
                "answers": talk.answers,
            }
        )


def _obey(talk: "_Talk", line: str) -> None:
    """Do what a line asks for: a command, or an answer."""
    from nybble.cli import output

    text = line.strip()
    if text == "/reset":
        talk.reset()
        if talk.notes:
            output.note("the conversation is forgotten")
    elif text == "/help":
        output.note(_HELP)
    elif text.startswith("/") and not text.startswith("//"):
        output.note(f"{text.split()[0]} is not a command; /help lists them")
    elif text:
        talk.answer(text.removeprefix("/") if text.startswith("//") else text)


@dataclass
class _Talk:
    """The conversation so far."""

    model: "LanguageModel"
    session: "Session"
    choice: "Choice"
    max_tokens: int | None
    system: str | None
    show: bool
    notes: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def reset(self) -> None:
        """Start from the beginning."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.messages = list(first)

    def answer(self, text: str) -> None:
        """Answer a message; Ctrl-C ends the answer where it is."""
        from nybble.cli import output, sampling
        from nybble.errors import ContextError

        self.messages.append({"role": "user", "content": text})
        writer = output.TextWriter()
        pieces: list[str] = []
        try:
            stream = self.model.chat_stream(
                self.messages, self.max_tokens, session=self.session, **self.choice.settings()
            )
            for piece in stream:
                pieces.append(piece)
                if self.show:
                    writer.write(piece)
            generation = stream.result()
        except ContextError:
            self.messages.pop()
            output.note(f"the conversation {self._full}")
            return
        finally:
            if self.show:
                writer.end()
            # What was written before Ctrl-C stays part of the conversation.
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
        if not pieces:
            self.messages.append({"role": "assistant", "content": ""})
        self.answers.append(sampling.to_json(generation))
        if self.notes:
            output.note(sampling.summary(generation, self.choice))
        if generation.finish_reason == "context":
            output.note(f"the answer {self._full}")

    @property
    def _full(self) -> str:
        return (
            f"does not fit into the context of {self.model.context} tokens any more: "
            "/reset starts a new conversation"
        )

    def stopped(self) -> None:
        """Tidy up after Ctrl-C: a question without an answer is forgotten."""
        from nybble.cli import output

        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()
        else:
            self.answers.append({"finish_reason": "interrupted"})
        output.note("(stopped)")


class _Lines:
    """Lines typed at a terminal, with history and editing, or read from a pipe."""

    def __init__(self, prompt: bool) -> None:
        self.terminal = sys.stdin.isatty()
        self._prompt = "> " if prompt and self.terminal else ""
        if self.terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  its import gives input() editing and history

    def next(self) -> str | None:
        """Return the next line, ``None`` at the end."""
        if self.terminal:
            try:
                return input(self._prompt)
            except EOFError:
                print()
                return None
        line = sys.stdin.readline()
        return line if line else None
