"""How the verbs that write text choose tokens, and how they report what it took."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.runtime import Generation


@dataclass(frozen=True)
class Choice:
    """The sampling options as given; what is not given is left to the defaults of the run-time."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments for ``stream`` and ``chat_stream``."""
        given = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "seed": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, so that the seed matters."""
        return bool(self.temperature)


def speeds(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Return tokens a second of the two phases, and the seconds until the first token."""

    def speed(tokens: float, seconds: float) -> float | None:
        return tokens / seconds if tokens and seconds > 0 else None

    draft = metrics.get("draft") or {}
    decoding = metrics["decode_seconds"] + sum(
        draft.get(part, 0.0) for part in ("draft_seconds", "learn_seconds")
    )
    return {
        "prefill_tokens_per_second": speed(metrics["prefill_tokens"], metrics["prefill_seconds"]),
        "decode_tokens_per_second": speed(metrics["decode_tokens"], decoding),
        "ttft_ms": metrics["prefill_seconds"] * 1e3,
    }


def to_json(generation: "Generation") -> dict[str, Any]:
    """Return what ``--json`` prints of a generation."""
    from nybble.bench.machine import peak_rss

    return {
        "text": generation.text,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "generated_tokens": len(generation.tokens),
        "seed": generation.seed,
        "metrics": {
            **generation.metrics,
            **speeds(generation.metrics),
            "peak_rss": peak_rss(),
        },
    }


def summary(generation: "Generation", choice: Choice) -> str:
    """Return the line that tells what a generation took."""
    from nybble.bench.machine import peak_rss
    from nybble.cli import output

    metrics, speed = generation.metrics, speeds(generation.metrics)
    prompt = f"prompt {generation.prompt_tokens} tokens"
    reused = generation.prompt_tokens - metrics["prefill_tokens"]
    if reused > 0 and metrics["prefill_tokens"]:
        prompt += f" ({reused} kept)"
    layers = metrics["layer_tokens"]
    if layers and min(layers) < max(layers):
        prompt += f" ({min(layers)} of {max(layers)} left in the last layers)"
    parts = [
        f"{prompt} at {output.rate(speed['prefill_tokens_per_second'])}",
        f"{len(generation.tokens)} new at {output.rate(speed['decode_tokens_per_second'])}",
        f"first after {metrics['prefill_seconds'] * 1e3:.0f} ms",
        f"peak memory {output.size(peak_rss())}",
        f"ended by {generation.finish_reason}",
    ]
    draft = metrics.get("draft")
    if draft and draft["drafted_steps"]:
        parts.insert(2, f"{draft['mean_accepted']:.2f} tokens a pass")
    if choice.draws and choice.seed is None:
        parts.append(f"seed {generation.seed}")
    return " | ".join(parts)


def read_prompt() -> str:
    """Read a prompt from stdin: UTF-8, without the newline that ends the last line."""
    from nybble.errors import ArgumentError

    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        msg = f"prompt: expected UTF-8 on stdin, found byte 0x{error.object[error.start]:02x}"
        raise ArgumentError(msg) from None
    return text.removesuffix("\n").removesuffix("\r")
