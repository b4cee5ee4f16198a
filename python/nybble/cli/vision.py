"""``nybble classify``, ``embed``, ``explain``, ``tune-tokens``: what an image encoder does."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import options

if TYPE_CHECKING:
    from nybble.runtime import ImageEncoder

_Images = Annotated[
    list[Path],
    typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False),
]
_Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        min=1,
        max=1 << 14,
        help="Height and width of the prepared images; without it what the folder says.",
        show_default=False,
    ),
]
_Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="NAME|FILE",
        help="Leave patches out between layers: a method (zero_tprune, evit, tome, "
        "attention_received, random), or a file written by tune-tokens. Faster; results change.",
        show_default=False,
    ),
]


def _open(model: str, threads: int | None, tokens: str | None = None) -> "ImageEncoder":
    from nybble.runtime import ImageEncoder

    return ImageEncoder.from_pretrained(options.open_path(model), threads, tokens=tokens)


def classify(
    model: options.ModelArgument,
    images: _Images,
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to show of each image.")] = 5,
    size: _Size = None,
    tokens: _Tokens = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Say what images show, with a model that has a classifier.

    The likeliest classes stand first, with their probability.
    """
    from nybble.cli import output

    encoder = _open(model, threads, tokens)
    # One by one: a file that cannot be read is named before the work on the others is done.
    found = [encoder.classify(image, top, size=size)[0] for image in images]
    if as_json:
        output.emit_json(
            {
                "images": [
                    {
                        "path": str(image),
                        "classes": [
                            {"index": p.index, "label": p.label, "score": p.score} for p in classes
                        ],
                    }
                    for image, classes in zip(images, found, strict=True)
                ]
            }
        )
        return
    table = output.grid("", ("image", "class", "probability"), right=(2,))
    for image, classes in zip(images, found, strict=True):
        for rank, guess in enumerate(classes):
            output.add(table, "" if rank else str(image), guess.label, f"{guess.score:.1%}")
    output.show(table)


def embed(
    model: options.ModelArgument,
    images: _Images,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the vectors there as a NumPy array of float32, one row an image.",
            show_default=False,
        ),
    ] = None,
    size: _Size = None,
    tokens: _Tokens = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Turn images into vectors, one each.

    Without --out a line for each image is printed: its path, a tab, and the numbers with spaces.
    """
    import numpy as np

    from nybble.cli import output
    from nybble.errors import FileError

    encoder = _open(model, threads, tokens)
    vectors = np.concatenate([encoder.encode(image, size=size).embedding for image in images])
    if out is not None:
        try:
            with out.open("wb") as file:
                np.save(file, vectors)
        except OSError as error:
            raise FileError(error.errno, error.strerror, str(out)) from None
    if as_json:
        output.emit_json(
            {
                "images": [str(image) for image in images],
                "width": int(vectors.shape[1]),
                "out": None if out is None else str(out),
                "vectors": vectors.tolist() if out is None else None,
            }
        )
    elif out is None:
        for image, vector in zip(images, vectors, strict=True):
            numbers = " ".join(f"{value:.6g}" for value in vector)
            print(f"{output.clean(str(image))}\t{numbers}")


def explain(
    model: options.ModelArgument,
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="An image file.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="PNG", help="Write the picture there.", show_default=False),
    ],
    tokens: _Tokens = None,
    size: _Size = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Draw which patches of an image survive each pruning layer.

    Patches that left are red; patches merged into one token have their mean colour. Without
    --tokens it is Zero-TPrune with the settings of its paper's DeiT-S.
    """
    from nybble.cli import output
    from nybble.errors import FileError
    from nybble.runtime.explain import explain as draw
    from nybble.tokens.patches import patch_method

    method = patch_method("zero_tprune" if tokens is None else tokens)
    picture, stages = draw(_open(model, threads), image, method, size=size)
    try:
        picture.save(out, format="PNG")
    except OSError as error:
        raise FileError(error.errno or 0, error.strerror or str(error), str(out)) from None
    if as_json:
        rows = [
            {"layer": stage.layer, "tokens": stage.tokens, "owners": stage.owners.tolist()}
            for stage in stages
        ]
        output.emit_json({"out": str(out), "layers": rows})
        return
    table = output.grid("", ("behind layer", "tokens left"), right=(0, 1))
    for stage in stages:
        output.add(table, str(stage.layer), str(stage.tokens))
    output.show(table)
    output.note(f"wrote {out}")


def tune_tokens(
    model: options.ModelArgument,
    images: _Images,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="Write the schedule there, as JSON.", show_default=False
        ),
    ],
    method: Annotated[
        str, typer.Option("--method", help="The method whose schedule is searched for.")
    ] = "zero_tprune",
    reduction: Annotated[
        float,
        typer.Option("--reduction", help="Share of the dense model's arithmetic to save."),
    ] = 0.35,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Schedules to try.")] = 60,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the schedules drawn.")] = 0,
    size: _Size = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Search for a schedule of token reduction that changes the model's outputs least.

    Images need no labels; some dozens will do. Schedules of equal cost are drawn at random and
    compared on them. Trials are kept in a file beside --out until the search is done, so one that
    was interrupted goes on where it was. The file written is for --tokens.
    """
    from tqdm import tqdm

    from nybble.cli import output
    from nybble.errors import FileError
    from nybble.tokens.tune import Trial, tune

    encoder = _open(model, threads)
    pixels = encoder.preprocess(images, size)
    state = out.with_name(out.name + ".trials")
    with tqdm(total=trials, unit="schedule", desc="tune-tokens") as bar:

        def progress(done: int, _: int, best: Trial) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(best=f"{best.divergence:.4g}")

        best = tune(
            encoder,
            pixels,
            method=method,
            reduction=reduction,
            trials=trials,
            seed=seed,
            state=state,
            progress=progress,
        )
    try:
        out.write_text(json.dumps(best.tokens, indent=2) + "\n", encoding="utf-8")
        state.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(out)) from None
    if as_json:
        output.emit_json(
            {
                "out": str(out),
                "tokens": best.tokens,
                "macs": best.macs,
                "divergence": best.divergence,
            }
        )
        return
    output.show(json.dumps(best.tokens))
    output.note(
        f"{1 - best.macs:.1%} of the arithmetic saved; outputs differ by {best.divergence:.4g} "
        f"({'nats' if encoder.info['labels'] else '1 - cosine'}); wrote {out}"
    )
