"""lm-evaluation-harness driving a nybble model: any of its tasks, on what runs here.

The harness has thousands of tasks, nybble a few; this adapter answers what the harness asks::

    import lm_eval
    from nybble.eval.harness import NybbleLM

    model = NybbleLM("path/to/folder")
    results = lm_eval.simple_evaluate(model, tasks=["lambada_openai"], limit=100)

Once this module is imported, ``simple_evaluate(model="nybble", model_args={"path": ...})`` does it
as well. Versions of the harness behind 0.4.13 find it by an entry point: ``lm_eval --model nybble
--model_args path=path/to/folder``. It needs the ``eval`` extra; torch is not imported.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nybble.errors import ArgumentError, ContextError, UnsupportedError
from nybble.eval.likelihood import Scorer, prefix
from nybble.runtime import LanguageModel, load_language

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

#: Tokens of an answer where the task does not say how many.
_NEW_TOKENS = 256
#: Generation settings of tasks and what they are called here.
_SETTINGS = {
    "do_sample": "do_sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "seed": "seed",
}


@register_model("nybble")
class NybbleLM(TemplateLM):  # type: ignore[misc]
    """A nybble model as the harness sees it.

    Parameters
    ----------
    path
        A folder or GGUF file, or a model that is loaded already.
    threads, kv
        As for :func:`nybble.runtime.load_language`.
    max_length
        Most tokens of a text, if fewer than the model's context.
    batch_size, max_batch_size, device
        What the harness passes to every model. Requests are computed one after the other, sharing
        the beginning of their texts, and on the CPU; any other device is an error.
    """

    def __init__(
        self,
        path: "str | Path | LanguageModel",
        threads: int | str | None = None,
        kv: str | None = None,
        max_length: int | str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if device not in (None, "cpu"):
            msg = f"device: expected cpu, found {device!r}"
            raise UnsupportedError(msg)
        if isinstance(path, LanguageModel):
            self.model = path
        else:
            self.model = load_language(path, None if threads is None else int(threads), kv=kv)
        self._scorer = Scorer(self.model, None if max_length is None else int(max_length))
        self.max_length = self._scorer.limit
        self.batch_size = 1

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        tokenizer = self.model.tokenizer
        end = tokenizer.token_id(tokenizer.special_tokens.get("eos_token", ""))
        if end is not None:
            return end
        if not self.model.end_ids:
            msg = f"{self.model.path}: the model has no end token"
            raise UnsupportedError(msg)
        return self.model.end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return prefix(self.model.tokenizer)[0]

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells tokenizers apart by."""
        return str(self.model.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's chat template, or one of several by its name."""
        if not chat_template:
            return None
        templates = self.model.tokenizer.templates
        name = "default" if chat_template is True else chat_template
        if name not in templates:
            known = ", ".join(sorted(templates)) or "none"
            msg = f"{self.model.path}: there is no chat template {name!r} (there are: {known})"
            raise UnsupportedError(msg)
        return templates[name]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a chat."""
        return self.model.tokenizer.render(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text; the spelling of a control token is that token.

        That is how the harness's own models encode, and what a rendered chat needs.
        """
        tokenizer = self.model.tokenizer
        if add_special_tokens is None:
            begin = tokenizer.special_tokens.get("bos_token")
            add_special_tokens = begin is None or not string.startswith(begin)
        return tokenizer.encode(string, add_special_tokens=add_special_tokens, parse_special=True)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        found = []
        for texts, context, continuation in tqdm(requests, "loglikelihood", disable=disable_tqdm):
            scored = self._scorer.score(context, continuation)
            found.append((scored.logprob, scored.greedy))
            self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts; each token is predicted once."""
        found = []
        for request in tqdm(requests, "loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            total = sum(
                self._scorer.score(*make_disjoint_window(window)).logprob for window in windows
            )
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Continue texts until one of a task's stop texts, its limit, or the model's end token."""
        found = []
        session = self.model.session()
        for request in tqdm(requests, "generate_until", disable=disable_tqdm):
            text, given = request.args
            stops, new, settings = _settings(given)
            room = self.max_length - new
            if room < 1:
                msg = (
                    f"max_gen_toks: expected fewer than the {self.max_length} tokens of the "
                    f"context, found {new}"
                )
                raise ContextError(msg)
            answer = self.model.generate(
                self.tok_encode(text)[-room:], new, stop=stops, session=session, **settings
            )
            found.append(answer.text)
            self.cache_hook.add_partial("generate_until", (text, given), answer.text)
        return found


def _settings(given: Mapping[str, Any]) -> tuple[Iterable[str], int, dict[str, Any]]:
    """Return a task's stop texts, its number of new tokens and its settings, by nybble's names."""
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), _NEW_TOKENS))
    stops = [stop for stop in settings.pop("until") if stop]
    new = settings.pop("max_gen_toks")
    unknown = sorted(settings.keys() - _SETTINGS.keys())
    if unknown:
        msg = f"generation settings: expected {', '.join(_SETTINGS)}; found {', '.join(unknown)}"
        raise ArgumentError(msg)
    return stops, new, {_SETTINGS[name]: value for name, value in settings.items()}
