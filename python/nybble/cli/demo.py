"""``nybble demo``: the whole way, from nothing to text, with the figures."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from nybble.runtime import Generation, LanguageModel

_PROMPT = "Write a short paragraph about the city of Paris."


def demo(
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="The model; `nybble pull --list`.")
    ] = "smollm2-135m-instruct",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The folder to write; without it one in the model cache, replaced every time.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", metavar="TEXT", help="What to ask the model.")
    ] = _PROMPT,
    max_tokens: options.MaxTokens = 200,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Fetch a small model, compress it to 4 bits, let it write, and print what it took.

    The weights become 4-bit integers (the embedding 8-bit), the activations 8-bit while it runs.
    """
    import nybble.runtime
    from nybble import anatomy, hub
    from nybble.bench import bandwidth, machine
    from nybble.cli import output, sampling

    say = (lambda _: None) if quiet or as_json else output.note
    pulled = hub.fetch(name, progress=not quiet, say=say)
    say(f"compress {pulled.path}")
    folder = hub.cache_dir() / "demo" / f"{name.replace('/', '--')}-w4a8" if out is None else out
    folder.parent.mkdir(parents=True, exist_ok=True)
    seconds = _compress(
        pulled.path, folder, overwrite=out is None, threads=threads, progress=not quiet
    )
    model = nybble.runtime.load_language(folder, threads)
    say(f"ask: {prompt}")
    generation = _ask(model, prompt, max_tokens, show=not as_json)
    peak = machine.peak_rss()
    before, after = anatomy.describe(pulled.path), anatomy.describe(folder)
    rate = bandwidth(model.info["threads"])
    if as_json:
        output.emit_json(
            {
                "model": name,
                "source": pulled.to_json(),
                "out": str(folder),
                "before": _sizes(before),
                "after": _sizes(after),
                "compress_seconds": seconds,
                "prompt": prompt,
                "generation": sampling.to_json(generation),
                "peak_rss": peak,
                "memory_bandwidth": rate,
            }
        )
        return
    output.show("", _table(before, after, seconds, generation, peak, rate, model))


def _compress(source: Path, folder: Path, **settings: Any) -> float:
    """Compress in a process of its own; return the seconds it took.

    This process then holds nothing but the model, so its peak memory is the running model's.
    """
    from nybble.errors import NybbleError

    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(_compress_here, source, folder, settings).result()
    except BrokenProcessPool:
        msg = f"compressing {source} ended without a word: was there enough memory?"
        raise NybbleError(msg) from None


def _compress_here(source: Path, folder: Path, settings: dict[str, Any]) -> float:
    from nybble.compress import compress

    return compress(source, folder, **settings).seconds


def _ask(model: "LanguageModel", prompt: str, max_tokens: int, *, show: bool) -> "Generation":
    """Let the model answer; greedily, so that everyone gets the same text."""
    from nybble.cli import output

    settings: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.1}
    if "default" in model.tokenizer.templates:
        stream = model.chat_stream([{"role": "user", "content": prompt}], max_tokens, **settings)
    else:
        stream = model.stream(prompt, max_tokens, **settings)
    if show:
        writer = output.TextWriter()
        try:
            for piece in stream:
                writer.write(piece)
        finally:
            writer.end()
    return stream.result()


def _sizes(found: dict[str, Any]) -> dict[str, Any]:
    keys = ("path", "kind", "scheme", "parameters", "tensor_bytes", "bits_per_weight", "disk_bytes")
    return {key: found[key] for key in keys}


def _is_float(found: dict[str, Any]) -> bool:
    return found["scheme"] in ("F32", "F16", "BF16")


def _table(
    before: dict[str, Any],
    after: dict[str, Any],
    seconds: float,
    generation: "Generation",
    peak: int | None,
    rate: float,
    model: "LanguageModel",
) -> "Table":
    from nybble.cli import output, sampling

    speed = sampling.speeds(generation.metrics)
    threads = model.info["threads"]

    def size(found: dict[str, Any]) -> str:
        return (
            f"{output.size(found['disk_bytes'])} "
            f"({found['scheme']}, {found['bits_per_weight']:.2f} bits a weight)"
        )

    return output.pairs(
        "",
        [
            ("model", f"{after['family']}, {after['parameters'] / 1e6:.1f} million weights"),
            ("in 16 bits", f"{output.size(after['parameters'] * 2)} (computed)"),
            ("as pulled", size(before) + ("" if _is_float(before) else ", quantized already")),
            ("compressed", f"{size(after)} in {output.seconds(seconds)}"),
            (
                "prompt",
                f"{generation.prompt_tokens} tokens at "
                f"{output.rate(speed['prefill_tokens_per_second'])}",
            ),
            (
                "text",
                f"{len(generation.tokens)} tokens at "
                f"{output.rate(speed['decode_tokens_per_second'])}",
            ),
            ("peak memory", f"{output.size(peak)} while it wrote"),
            (
                "machine",
                f"{threads} thread{'s' if threads > 1 else ''}, memory read at "
                f"{rate / 1e9:.1f} GB/s",
            ),
            ("folder", after["path"]),
        ],
    )
