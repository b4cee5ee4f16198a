"""Ask a language model for logits, text or an answer."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError
from nybble.runtime.files import MAX_CONFIG, read_json
from nybble.runtime.generation import Generation, Sampling, Stream, count
from nybble.runtime.session import Session, token_array

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble import _nybble
    from nybble.runtime.tokenizer import Tokenizer
    from nybble.sparsity import Thresholds
    from nybble.speculate import Drafts
    from nybble.speculate.settings import DraftLike
    from nybble.tokens import TokenMethod, TokenPolicy

__all__ = ["DEFAULT_NEW_TOKENS", "LanguageModel"]

DEFAULT_NEW_TOKENS = 256
"""Most new tokens when nothing is asked for."""


class LanguageModel:
    """A model that writes text.

    Made by :func:`nybble.load`. One model can be used by several threads; its weights are shared
    and the threads take turns. A child process after ``fork`` can go on using it.

    Parameters
    ----------
    raw
        The extension's model.
    path
        The folder or file it came from.
    draft
        How it speculates, as for :func:`nybble.runtime.load_language`.
    sparsity
        What it takes for zero, as for :func:`nybble.runtime.load_language`.
    """

    def __init__(
        self,
        raw: _nybble.Model,
        path: Path,
        draft: DraftLike = "off",
        sparsity: Sequence[Thresholds] | str | None = None,
    ) -> None:
        self.raw = raw
        self._draft = draft
        self._speculators: dict[Drafts, _nybble.Speculator | None] = {}
        self.path = path
        self.info: dict[str, Any] = json.loads(raw.info())
        self.vocab_size = int(self.info["vocab"])
        self.context = int(self.info["context"])
        self.sparsify(sparsity)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights, loaded when first asked for."""
        from nybble.runtime import tokenizer

        if self.path.is_dir():
            return tokenizer.from_folder(self.path)
        from nybble import _nybble

        metadata = _nybble.Checkpoint.open(self.path).gguf_metadata()
        return tokenizer.from_gguf(metadata, str(self.path))

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer beside the weights."""
        names = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
        return self.path.is_file() or any((self.path / name).exists() for name in names)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as the configuration files and the tokenizer say."""
        ends: set[int] = set()
        if self.path.is_dir():
            for name in ("generation_config.json", "config.json"):
                value = read_json(self.path / name, MAX_CONFIG, missing={}).get("eos_token_id")
                found = value if isinstance(value, list) else [value]
                ends |= {i for i in found if isinstance(i, int) and 0 <= i < self.vocab_size}
                if ends:
                    break
        if self.has_tokenizer:
            ends |= set(self.tokenizer.end_ids)
        return tuple(sorted(i for i in ends if i < self.vocab_size))

    def session(
        self, tokens: TokenPolicy | TokenMethod | Mapping[str, Any] | str | None = None
    ) -> Session:
        """Return a new, empty session; see :class:`nybble.runtime.session.Session`.

        Parameters
        ----------
        tokens
            How prompts in it are reduced, if not as the model says; as for
            :func:`nybble.runtime.load_language`.
        """
        from nybble.tokens import to_json

        raw = self.raw.session(to_json(tokens), self._sparsity, self._sparsity is None)
        return Session(raw, self.vocab_size)

    def sparsify(self, sparsity: Sequence[Thresholds] | str | None, *, probe: bool = True) -> None:
        """Take other values for zero, in sessions made from now on.

        Parameters
        ----------
        sparsity
            As for :func:`nybble.runtime.load_language`.
        probe
            Whether to find out where skipping them saves time; without it none are skipped, with
            the same results.
        """
        from nybble import _nybble
        from nybble.sparsity import runtime

        if sparsity is None:
            self._sparsity = self.raw.sparsity()
        elif sparsity == "off":
            self._sparsity = None
        elif isinstance(sparsity, str):
            message = f"sparsity: expected thresholds or 'off', found {sparsity!r:.60}"
            raise ArgumentError(message)
        else:
            self._sparsity = _nybble.Sparsity(self.raw, [layer.raw() for layer in sparsity])
        if probe and self._sparsity is not None:
            runtime.probe(self.raw, self.info, self._sparsity)

    def forward(self, ids: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the logits after each of `ids`, an array of shape ``[n, vocab]``.

        Parameters
        ----------
        ids
            Tokens from the beginning of a text. For a text that goes on, use :meth:`session`.
        """
        array = token_array(ids, self.vocab_size)
        if array.size == 0:
            message = "ids: expected at least one token, found none"
            raise ArgumentError(message)
        return self.session().raw.forward(array, "all")

    __call__ = forward

    def generate(
        self,
        prompt: str | Sequence[int] | npt.NDArray[Any],
        max_new_tokens: int | None = None,
        *,
        streamer: Callable[[str], object] | None = None,
        **settings: Any,
    ) -> Generation:
        """Continue `prompt` and return the whole continuation.

        See :meth:`stream` for the parameters.

        Parameters
        ----------
        prompt
            Text, or tokens.
        max_new_tokens
            Most tokens to generate.
        streamer
            Called with each piece of text as it comes.
        **settings
            As for :meth:`stream`.
        """
        stream = self.stream(prompt, max_new_tokens, **settings)
        if streamer is not None:
            for piece in stream:
                streamer(piece)
        return stream.result()

    def stream(
        self,
        prompt: str | Sequence[int] | npt.NDArray[Any],
        max_new_tokens: int | None = None,
        *,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
        skip_special_tokens: bool = True,
        parse_special: bool = False,
        session: Session | None = None,
        draft: DraftLike = None,
    ) -> Stream:
        """Continue `prompt` and give out the text while it comes.

        Without a temperature the most probable token is taken every time.

        Parameters
        ----------
        prompt
            Text, or tokens. An empty text is allowed where the tokenizer begins texts with a token.
        max_new_tokens
            Most tokens to generate; by default `DEFAULT_NEW_TOKENS`. Where the context is full
            earlier, the result's ``finish_reason`` says so.
        do_sample, temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed
            See :class:`~nybble.runtime.generation.Sampling`.
        stop
            Texts that end the generation; they are not part of the result.
        ignore_end
            Whether to go on when the model ends the text.
        skip_special_tokens
            Whether control tokens are left out of the text.
        parse_special
            Whether control tokens spelled in a text prompt become control tokens.
        session
            The session to continue in: what `prompt` shares with it is not computed again.
        draft
            How to speculate, if not as the model was told when it was loaded; as for
            :func:`nybble.runtime.load_language`.
            It changes the speed, never the tokens.

        Raises
        ------
        ArgumentError
            When a setting is out of its range, or there is no prompt.
        TokenError
            When a token is not in the vocabulary.
        ContextError
            When the prompt does not fit into the context.
        """
        array = token_array(
            self.tokenizer.encode(prompt, parse_special=parse_special)
            if isinstance(prompt, str)
            else prompt,
            self.vocab_size,
        )
        return self._stream(
            array.tolist(),
            max_new_tokens,
            Sampling.choose(
                do_sample=do_sample,
                temperature=temperature,
                seed=seed,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repeat_penalty=repeat_penalty,
                repeat_last_n=repeat_last_n,
            ),
            stops=_stop_strings(stop),
            ends=() if ignore_end else self.end_ids,
            skip_special_tokens=skip_special_tokens,
            session=session,
            draft=draft,
            continues=isinstance(prompt, str),
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        max_new_tokens: int | None = None,
        *,
        streamer: Callable[[str], object] | None = None,
        **settings: Any,
    ) -> Generation:
        """Answer the last of `messages`.

        Parameters
        ----------
        messages
            Mappings with ``role`` and ``content``. Control tokens spelled in a content stay text.
        max_new_tokens
            Most tokens to generate.
        streamer
            Called with each piece of text as it comes.
        **settings
            As for :meth:`chat_stream`.
        """
        stream = self.chat_stream(messages, max_new_tokens, **settings)
        if streamer is not None:
            for piece in stream:
                streamer(piece)
        return stream.result()

    def chat_stream(
        self,
        messages: Sequence[Mapping[str, object]],
        max_new_tokens: int | None = None,
        *,
        template_variables: Mapping[str, object] | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        skip_special_tokens: bool = True,
        session: Session | None = None,
        draft: DraftLike = None,
        **sampling: Any,
    ) -> Stream:
        """Answer the last of `messages` and give out the text while it comes.

        Parameters
        ----------
        messages
            Mappings with ``role`` and ``content``.
        max_new_tokens
            Most tokens to generate.
        template_variables
            What else the chat template reads, ``tools`` for example.
        do_sample, temperature, seed, stop, skip_special_tokens, session, draft
            As for :meth:`stream`.
        **sampling
            ``top_k``, ``top_p``, ``min_p``, ``repeat_penalty``, ``repeat_last_n``.
        """
        variables: dict[str, Any] = dict(template_variables or {})
        ids = self.tokenizer.chat(messages, **variables)
        ends = set(self.end_ids)
        if (end := self._turn_end) is not None:
            ends.add(end)
        return self._stream(
            token_array(ids, self.vocab_size).tolist(),
            max_new_tokens,
            Sampling.choose(do_sample=do_sample, temperature=temperature, seed=seed, **sampling),
            stops=_stop_strings(stop),
            ends=tuple(sorted(ends)),
            skip_special_tokens=skip_special_tokens,
            session=session,
            draft=draft,
            continues=False,
        )

    @cached_property
    def _turn_end(self) -> int | None:
        end = self.tokenizer.turn_end()
        return end if end is not None and end < self.vocab_size else None

    def _stream(
        self,
        ids: list[int],
        max_new_tokens: int | None,
        sampling: Sampling,
        *,
        stops: tuple[str, ...],
        ends: tuple[int, ...],
        skip_special_tokens: bool,
        session: Session | None,
        draft: DraftLike,
        continues: bool,
    ) -> Stream:
        import numpy as np

        if not ids:
            message = "prompt: expected at least one token, found none"
            raise ArgumentError(message)
        new = DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        new = count("max_new_tokens", new)
        if session is None:
            session = self.session()
        rest = session.rewind(ids)
        speculator = self.speculator(draft)
        raw = session.raw.generate(
            np.asarray(rest, dtype=np.uint32),
            new,
            list(ends),
            temperature=float(sampling.temperature),
            top_k=int(sampling.top_k),
            top_p=float(sampling.top_p),
            min_p=float(sampling.min_p),
            repeat_penalty=float(sampling.repeat_penalty),
            repeat_last_n=int(sampling.repeat_last_n),
            seed=int(sampling.seed),
            speculator=speculator,
        )
        decoder = None
        if self.has_tokenizer:
            decoder = self.tokenizer.stream(
                skip_special_tokens=skip_special_tokens, context=ids if continues else ()
            )
        elif stops:
            message = f"stop: {self.path} has no tokenizer to compare texts with"
            raise ArgumentError(message)
        return Stream(
            raw,
            decoder,
            stops=stops,
            prompt_tokens=len(ids),
            seed=sampling.seed,
            on_end=None if speculator is None else lambda: self._keep_times(speculator),
        )

    def speculator(self, draft: DraftLike = None) -> _nybble.Speculator | None:
        """Return what texts drafted that way share, made when first asked for.

        Parameters
        ----------
        draft
            As for :func:`nybble.runtime.load_language`; ``None`` for what the model was told there.

        Returns
        -------
        The extension's object, or ``None`` where speculation is off: because that was asked for, or
        by itself for a model whose attention cannot take drafts.
        """
        from nybble import _nybble
        from nybble.errors import UnsupportedError
        from nybble.speculate import parse, times

        draft = self._draft if draft is None else draft
        drafts = parse(draft)
        if drafts is None:
            return None
        if drafts not in self._speculators:
            try:
                made = _nybble.Speculator(self.raw, drafts.to_json())
            except UnsupportedError:
                if draft != "auto":
                    raise
                self._speculators[drafts] = None
                return None
            if known := times.read(self.info):
                with contextlib.suppress(ArgumentError):
                    made.set_times(known)
                    self._kept_times = known
            self._speculators[drafts] = made
        return self._speculators[drafts]

    _kept_times: list[tuple[int, float]] | None = None

    def _keep_times(self, speculator: _nybble.Speculator) -> None:
        """Keep for later processes what was measured in this one, and what has turned out since."""
        from nybble.speculate import times

        found = speculator.times()
        if found is not None and times.differ(self._kept_times, found):
            self._kept_times = found
            times.write(self.info, found)

    def save_drafts(self, path: str | os.PathLike[str], draft: DraftLike = None) -> None:
        """Save what recycling learned, for ``draft={"matrix": path}``.

        Parameters
        ----------
        path
            The file; it is replaced as a whole.
        draft
            As for :meth:`speculator`.

        Raises
        ------
        ArgumentError
            When speculation is off.
        """
        speculator = self.speculator(draft)
        if speculator is None:
            message = "draft: expected speculation, found none"
            raise ArgumentError(message)
        speculator.save(path)

    def __repr__(self) -> str:
        return f"LanguageModel({str(self.path)!r}, {self.info.get('family')})"


def _stop_strings(stop: object) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(s, str) and s for s in stops):
        message = "stop: expected texts of at least one character"
        raise ArgumentError(message)
    return tuple(stops)
