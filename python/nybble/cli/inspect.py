"""``nybble inspect``: what a model's files consist of."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import options

if TYPE_CHECKING:
    from rich.table import Table


def inspect(
    model: options.ModelArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor as well.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show family, layers, sizes, quantization and tokenizer of a model.

    Headers are read, weights are not: it takes no memory, however large the model is.
    """
    from nybble.anatomy import describe
    from nybble.cli import output

    found = describe(options.open_path(model))
    if as_json:
        if not tensors:
            del found["tensors"]
        output.emit_json(found)
        return
    tables = [_overview(found), _layouts(found)]
    if found["quantization"]:
        tables.append(_groups(found))
    if tensors:
        tables.append(_tensors(found))
    output.show(*tables)


def _overview(found: dict[str, Any]) -> "Table":
    from nybble.cli import output

    tokenizer = found["tokenizer"]
    if tokenizer is None:
        words = "none: it reads images"
    elif "error" in tokenizer:
        words = f"none usable: {tokenizer['error']}"
    else:
        ends = ", ".join(repr(token) for token in tokenizer["end_tokens"]) or "no end token"
        chats = "with" if tokenizer["chat_templates"] else "no"
        words = (
            f"{output.count(tokenizer['vocab'])} tokens, ends with {ends}, {chats} chat template"
        )

    def shown(value: int | None) -> str:
        return "not stated" if value is None else output.count(value)

    tied = ", head tied to the embedding" if found["tied_head"] else ""
    rows = [
        ("family", f"{found['family']} ({'GGUF file' if found['kind'] == 'gguf' else 'folder'})"),
        ("weights", f"{found['scheme']}, {found['bits_per_weight']:.2f} bits a weight"),
        ("parameters", output.count(found["parameters"])),
        (
            "shape",
            f"{shown(found['layers'])} layers, width {shown(found['hidden'])}, "
            f"{shown(found['heads'])} heads, {shown(found['kv_heads'])} key-value heads",
        ),
        *(
            []
            if found["reads"] == "images"
            else [
                ("vocabulary", shown(found["vocab"]) + tied),
                ("context", f"{shown(found['context'])} tokens"),
            ]
        ),
        (
            "size",
            f"{output.size(found['tensor_bytes'])} of tensors, "
            f"{output.size(found['disk_bytes'])} on disk",
        ),
        ("tokenizer", words),
    ]
    if found["nybble"] is not None:
        rows.append(("nybble", f"folder version {found['nybble'].get('version', '?')}"))
    return output.pairs(found["path"], rows)


def _layouts(found: dict[str, Any]) -> "Table":
    from nybble.cli import output

    table = output.grid(
        "Layouts", ("layout", "tensors", "weights", "size", "bits a weight"), right=(1, 2, 3, 4)
    )
    for name, entry in found["layouts"].items():
        output.add(
            table,
            name,
            output.count(entry["tensors"]),
            output.count(entry["weights"]),
            output.size(entry["bytes"]),
            f"{entry['bits_per_weight']:.2f}",
        )
    return table


def _groups(found: dict[str, Any]) -> "Table":
    from nybble.cli import output

    table = output.grid(
        "Quantization groups",
        ("targets", "weights", "scales", "zero points", "activations"),
        right=(),
    )
    for entry in found["quantization"]:
        strategy = entry["strategy"]
        scales = f"one for {entry['group']} weights" if strategy == "group" else f"one a {strategy}"
        inputs = (
            "float"
            if entry["activation_bits"] == 16
            else f"{entry['activation_bits']} bit, one scale a {entry['activation_strategy']}"
        )
        output.add(
            table,
            ", ".join(map(str, entry["targets"])),
            f"{entry['weight_bits']} bit",
            scales,
            "no" if entry["symmetric"] else "yes",
            inputs,
        )
    return table


def _tensors(found: dict[str, Any]) -> "Table":
    from nybble.cli import output

    table = output.grid("Tensors", ("name", "layout", "shape", "size"), right=(3,))
    for entry in found["tensors"]:
        shape = " x ".join(map(str, entry["shape"])) or "scalar"
        output.add(table, entry["name"], entry["layout"], shape, output.size(entry["bytes"]))
    return table
