"""``nybble pull``: bring a model onto this machine."""

from typing import Annotated

import typer

from nybble.cli import options


def pull(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A known name (see --list) or an org/name id of the Hugging Face hub.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            "--source",
            metavar="auto|hub|package",
            help="Where to ask: auto is the hub first, then the Python package with a pinned copy.",
        ),
    ] = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the hashes of a model that is here already.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch it again even if it is here.")
    ] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="List the known names and what is here.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Fetch a model into the cache and print its path.

    The files come from the Hugging Face hub, or, where that cannot be reached, from a Python
    package that carries them. Sizes and hashes are checked, nothing of what arrives is executed,
    and a model enters the cache whole or not at all.

    NYBBLE_CACHE names the cache (else XDG_CACHE_HOME/nybble, else ~/.cache/nybble);
    NYBBLE_OFFLINE=1 leaves out the hub.
    """
    from nybble import hub
    from nybble.cli import output

    if source not in hub.SOURCES:
        msg = f"{source!r} is not one of {', '.join(hub.SOURCES)}."
        raise typer.BadParameter(msg, param_hint="--source")
    if list_:
        _list(as_json=as_json)
        return
    if name is None:
        msg = "a name is needed (or --list)."
        raise typer.BadParameter(msg, param_hint="NAME")
    pulled = hub.fetch(
        name,
        source=source,
        force=force,
        verify=verify,
        progress=not quiet,
        say=(lambda _: None) if quiet else output.note,
    )
    if as_json:
        output.emit_json(pulled.to_json())
        return
    if not quiet:
        where = "already here" if pulled.cached else f"from {pulled.origin}"
        output.note(f"{pulled.name}: {output.size(pulled.size)}, {where}")
    print(pulled.path)


def _list(*, as_json: bool) -> None:
    from nybble import hub
    from nybble.cli import output

    here = {name: hub.find(name) for name in hub.KNOWN}
    if as_json:
        output.emit_json(
            {
                "cache": str(hub.cache_dir()),
                "models": [
                    {
                        "name": model.name,
                        "title": model.title,
                        "licence": model.licence,
                        "hub": model.hub,
                        "packages": [f"{part.package}=={part.version}" for part in model.parts],
                        "packaged_bytes": model.size,
                        "sha256": model.sha256,
                        "path": str(found.path) if (found := here[model.name]) else None,
                    }
                    for model in hub.KNOWN.values()
                ],
            }
        )
        return
    table = output.grid("", ("name", "model", "packaged", "licence", "here"), right=(2,))
    for model in hub.KNOWN.values():
        output.add(
            table,
            model.name,
            model.title,
            output.size(model.size),
            model.licence,
            "yes" if here[model.name] else "no",
        )
    output.show(table)
    output.note(f"cache: {hub.cache_dir()}")
