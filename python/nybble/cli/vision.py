"""``nybble classify`` and ``nybble embed``: what an image encoder makes of images."""

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


def _open(model: str, threads: int | None) -> "ImageEncoder":
    from nybble.runtime import ImageEncoder

    return ImageEncoder.from_pretrained(options.open_path(model), threads)


def classify(
    model: options.ModelArgument,
    images: _Images,
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to show of each image.")] = 5,
    size: _Size = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Say what images show, with a model that has a classifier.

    The likeliest classes stand first, with their probability.
    """
    from nybble.cli import output

    encoder = _open(model, threads)
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
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Turn images into vectors, one each.

    Without --out a line for each image is printed: its path, a tab, and the numbers with spaces.
    """
    import numpy as np

    from nybble.cli import output
    from nybble.errors import FileError

    encoder = _open(model, threads)
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
