"""``nybble run``: continue a prompt."""

from typing import Annotated

import typer

from nybble.cli import options


def run(
    model: options.ModelArgument,
    prompt: Annotated[
        str,
        typer.Option(
            "-p",
            "--prompt",
            metavar="TEXT",
            help="The prompt; - reads it from stdin (without its last newline).",
            show_default=False,
        ),
    ],
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--max-tokens",
            min=0,
            help="Most new tokens; without it 256, or as many as the context holds.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--raw",
            help="--chat puts the prompt into the model's chat template, as instruct models "
            "expect; --raw continues it as it stands.",
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", metavar="TEXT", help="System message, with --chat.", show_default=False
        ),
    ] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="End before this text; may be repeated.",
            show_default=False,
        ),
    ] = None,
    context: options.ContextLimit = None,
    threads: options.Threads = None,
    kv: options.Kv = None,
    prune_tokens: options.PruneTokens = None,
    prune_by: options.PruneBy = options.Criterion.START,
    draft: options.Draft = "auto",
    draft_index: options.DraftIndex = None,
    draft_model: options.DraftModel = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt and print the text as it is written.

    Without --temperature the likeliest token is taken every time, so the same prompt gives the same
    text. The speed and the memory it took stand on stderr at the end.
    """
    import nybble.runtime
    from nybble.cli import output, sampling

    if system is not None and not chat:
        msg = "needs --chat."
        raise typer.BadParameter(msg, param_hint="--system")
    if stop and "" in stop:
        msg = "the text is empty."
        raise typer.BadParameter(msg, param_hint="--stop")
    text = sampling.read_prompt() if prompt == "-" else prompt
    choice = sampling.Choice(temperature, top_k, top_p, min_p, repeat_penalty, seed)
    tokens = options.token_policy(prune_tokens, prune_by)
    language_model = nybble.runtime.load_language(
        options.open_path(model),
        threads,
        context=context,
        kv=kv,
        tokens=tokens,
        draft=options.drafts(draft, draft_index, draft_model),
    )
    settings = {**choice.settings(), "stop": stop or ()}
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        stream = language_model.chat_stream(messages, max_tokens, **settings)
    else:
        stream = language_model.stream(text, max_tokens, **settings)
    if as_json:
        generation = stream.result()
        output.emit_json({"model": str(language_model.path), **sampling.to_json(generation)})
        return
    writer = output.TextWriter()
    try:
        for piece in stream:
            writer.write(piece)
    finally:
        writer.end()  # after Ctrl-C too: the shell's prompt belongs on its own line
    if not quiet:
        output.note(sampling.summary(stream.result(), choice))
