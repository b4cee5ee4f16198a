"""Text to tokens and back.

:class:`Tokenizer` wraps the tokenizers library and adds what a run-time needs around it: text of
users never becomes control tokens unless asked for, files that make the library panic are errors
like any other, chat templates are rendered in a sandbox, and a tokenizer can be rebuilt from the
metadata of a GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError, FormatError, MissingFileError, UnsupportedError
from nybble.runtime.chat import Marker, render_messages
from nybble.runtime.files import MAX_CONFIG, read_json, read_text
from nybble.runtime.gguf_tokenizer import byte_level_json, rebuild, template_processor
from nybble.runtime.guard import tokenizer_errors
from nybble.runtime.text import TextDecoder

if TYPE_CHECKING:
    import tokenizers

__all__ = ["MAX_FILE", "Tokenizer", "from_folder", "from_gguf", "save"]

MAX_FILE = 256 << 20
"""Bytes of a ``tokenizer.json``."""
_MAX_ID = (1 << 32) - 1


class Tokenizer:
    """Encodes, decodes, and renders chats.

    Parameters
    ----------
    text
        The content of a ``tokenizer.json``.
    config
        The content of a ``tokenizer_config.json``.
    templates
        Chat templates by name; the one used when none is named is called ``default``.
    where
        The file or folder it came from, for messages.
    end_ids
        Tokens that end a text, where the files know more than the configuration's ``eos_token``.
    """

    def __init__(
        self,
        text: str,
        config: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
        *,
        where: str = "tokenizer",
        end_ids: Iterable[int] = (),
    ) -> None:
        self.where = where
        self.config = dict(config or {})
        self.templates = dict(templates or {})
        self._text = text
        # Whether control tokens in a text are meant is state of the library's object. Two objects
        # need no lock, and most uses need only one of them.
        self._backends: dict[bool, tokenizers.Tokenizer] = {}
        backend = self._backend(False)
        with tokenizer_errors(where, "reading the vocabulary"):
            added = backend.get_added_tokens_decoder()
            self.vocab_size = int(backend.get_vocab_size(with_added_tokens=True))
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.special_tokens = {
            name: spelling
            for name, value in self.config.items()
            if name.endswith("_token") and (spelling := _spelling(value)) is not None
        }
        self._marker = Marker([added[index].content for index in sorted(self.special_ids)])
        ends = set(end_ids)
        if (end := self.token_id(self.special_tokens.get("eos_token", ""))) is not None:
            ends.add(end)
        self.end_ids = tuple(sorted(ends))

    def _backend(self, parse_special: bool) -> tokenizers.Tokenizer:
        backend = self._backends.get(parse_special)
        if backend is None:
            import tokenizers  # here, because it takes a while to load

            with tokenizer_errors(self.where, "loading"):
                backend = tokenizers.Tokenizer.from_str(self._text)
                backend.no_truncation()
                backend.no_padding()
                backend.encode_special_tokens = not parse_special
            self._backends[parse_special] = backend
        return backend

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Return the tokens of `text`.

        Parameters
        ----------
        text
            Any text; lone surrogates are refused.
        add_special_tokens
            Whether the tokens a model expects around a text (a begin token, mostly) are added.
        parse_special
            Whether the spelling of a control token in `text` becomes that token. For text of users
            it should not.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"text: expected Unicode characters, found a lone surrogate at {error.start}"
            raise ArgumentError(message) from None
        with tokenizer_errors(self.where, "encoding"):
            encoding = self._backend(parse_special).encode(
                text, add_special_tokens=add_special_tokens
            )
            return list(encoding.ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; ids without a token have no text."""
        with tokenizer_errors(self.where, "decoding"):
            return str(
                self._backend(False).decode(
                    _checked_ids(ids), skip_special_tokens=skip_special_tokens
                )
            )

    def stream(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> TextDecoder:
        """Return a decoder of tokens that come one after the other.

        Parameters
        ----------
        skip_special_tokens
            Whether control tokens have no text.
        context
            Tokens before the first one, so that its leading space is kept.
        """

        def decode(ids: list[int]) -> str:
            return self.decode(ids, skip_special_tokens=skip_special_tokens)

        return TextDecoder(decode, context)

    def token_id(self, token: str) -> int | None:
        """Return the id of `token`, spelled as the vocabulary spells it."""
        with tokenizer_errors(self.where, "looking up a token"):
            index = self._backend(False).token_to_id(token)
        return None if index is None else int(index)

    def token(self, index: int) -> str | None:
        """Return the spelling of the token `index`."""
        with tokenizer_errors(self.where, "looking up a token"):
            token = self._backend(False).id_to_token(*_checked_ids([index]))
        return None if token is None else str(token)

    @property
    def text(self) -> str:
        """The content of its ``tokenizer.json``."""
        return self._text

    @property
    def begins(self) -> bool:
        """Whether a text gets a begin token, so that even an empty one has tokens."""
        return bool(self.encode(""))

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: object,
    ) -> str:
        """Return the text of a chat, as :meth:`chat` encodes it.

        See :meth:`chat` for the parameters.
        """
        text, mark = self._render(messages, add_generation_prompt, template, variables)
        return text.replace(mark, "")

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: object,
    ) -> list[int]:
        """Return the tokens of a chat.

        Parameters
        ----------
        messages
            Mappings with ``role`` and ``content``. Control tokens spelled in a content stay text.
        add_generation_prompt
            Whether the tokens end with the beginning of the assistant's turn.
        template
            The name of the template, where the model has several.
        **variables
            What else the template reads, ``tools`` or ``enable_thinking`` for example.
        """
        text, mark = self._render(messages, add_generation_prompt, template, variables)
        out: list[int] = []
        for part, meant in self._marker.parts(text, mark):
            out += self.encode(part, add_special_tokens=False, parse_special=meant)
        return out

    def turn_end(self) -> int | None:
        """Return the token that ends the assistant's turn in a chat, if the template shows one."""
        probe = "nybble"
        try:
            text = self.render(
                [{"role": "user", "content": probe}, {"role": "assistant", "content": probe}],
                add_generation_prompt=False,
            )
        except (ArgumentError, FormatError, UnsupportedError):
            return None
        rest = text.rpartition(probe)[2]
        tokens = self.encode(rest, add_special_tokens=False, parse_special=True)
        return next((token for token in tokens if token in self.special_ids), None)

    def _render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool,
        template: str | None,
        variables: Mapping[str, object],
    ) -> tuple[str, str]:
        name = "default" if template is None else template
        source = self.templates.get(name)
        if source is None:
            known = ", ".join(sorted(self.templates)) or "none"
            message = f"{self.where}: there is no chat template {name!r} (there are: {known})"
            raise UnsupportedError(message)
        return render_messages(
            source,
            messages,
            where=self.where,
            marker=self._marker,
            add_generation_prompt=add_generation_prompt,
            special=self.special_tokens,
            extra=variables,
        )

    def save(self, directory: str | Path) -> list[str]:
        """Write the tokenizer's files into `directory`; return their names."""
        folder = Path(directory)
        files = {
            "tokenizer.json": self._text,
            "tokenizer_config.json": json.dumps(self.config, ensure_ascii=False, indent=2) + "\n",
        }
        if "default" in self.templates:
            files["chat_template.jinja"] = self.templates["default"]
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8", newline="")
        return list(files)

    def __repr__(self) -> str:
        return f"Tokenizer({self.where!r}, vocab_size={self.vocab_size})"


def _checked_ids(ids: Iterable[int]) -> list[int]:
    out = [int(index) for index in ids]
    for position, index in enumerate(out):
        if not 0 <= index <= _MAX_ID:
            message = f"ids: expected token ids, found {index} at position {position}"
            raise ArgumentError(message)
    return out


def _spelling(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def from_folder(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder.

    Raises
    ------
    MissingFileError
        When the folder has no tokenizer.
    FormatError
        When one of its files is damaged.
    UnsupportedError
        When the folder has a tokenizer of a kind that is not read here.
    """
    folder = Path(path)
    config = read_json(folder / "tokenizer_config.json", MAX_CONFIG, missing={})
    more = read_json(folder / "special_tokens_map.json", MAX_CONFIG, missing={})
    for name, value in more.items():
        config.setdefault(name, value)
    templates = _templates(folder, config)
    config.pop("chat_template", None)
    file = folder / "tokenizer.json"
    if file.exists():
        text = read_text(file, MAX_FILE)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        file = folder / "vocab.json"
        text = json.dumps(_from_merges(folder, config), ensure_ascii=False)
    elif any((folder / name).exists() for name in ("tokenizer.model", "spiece.model")):
        message = (
            f"{folder}: only a SentencePiece tokenizer.model is there; save the tokenizer as "
            "tokenizer.json first (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
        raise UnsupportedError(message)
    else:
        raise MissingFileError(2, "the folder has no tokenizer", str(file))
    return Tokenizer(text, config, templates, where=str(file))


def from_gguf(metadata: Mapping[str, object], where: str = "gguf") -> Tokenizer:
    """Rebuild the tokenizer of a GGUF file; see :mod:`nybble.runtime.gguf_tokenizer`."""
    parts = rebuild(metadata, where)
    text = json.dumps(parts.tokenizer, ensure_ascii=False)
    return Tokenizer(text, parts.config, parts.templates, where=where, end_ids=parts.end_ids)


def save(tokenizer: Tokenizer, directory: str | Path) -> list[str]:
    """Write the files of `tokenizer` into `directory`; return their names."""
    return tokenizer.save(directory)


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, Mapping) and isinstance(item.get("template"), str):
                templates[str(item.get("name"))] = item["template"]
    legacy = read_json(folder / "chat_template.json", MAX_CONFIG, missing={}).get("chat_template")
    if isinstance(legacy, str):
        templates["default"] = legacy
    file = folder / "chat_template.jinja"
    if file.exists():
        templates["default"] = read_text(file, MAX_CONFIG)
    return templates


def _from_merges(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Build a tokenizer from the ``vocab.json`` and ``merges.txt`` of GPT-2's time."""
    vocabulary = read_json(folder / "vocab.json", MAX_FILE)
    for token, index in vocabulary.items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= _MAX_ID:
            message = f"{folder / 'vocab.json'}: {token}: expected a token id, found {index!r}"
            raise FormatError(message)
    lines = read_text(folder / "merges.txt", MAX_FILE).split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    tokenizer = byte_level_json(vocabulary, merges)
    spellings = {_spelling(value) for name, value in config.items() if name.endswith("_token")}
    special = {token: vocabulary[token] for token in spellings if token in vocabulary}
    tokenizer["added_tokens"] = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, index in sorted(special.items(), key=lambda item: item[1])
    ]
    begin = _spelling(config.get("bos_token"))
    if config.get("add_bos_token") is True and begin in vocabulary:
        names = {index: token for token, index in vocabulary.items()}
        ordered = [names.get(index, "") for index in range(max(names) + 1)]
        tokenizer["post_processor"] = template_processor(ordered, vocabulary[begin], None)
    return tokenizer
