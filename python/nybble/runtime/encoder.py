"""Encode images: tokens, embeddings, classes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError, UnsupportedError
from nybble.runtime.files import MAX_CONFIG, read_json
from nybble.runtime.generation import count
from nybble.runtime.images import ImageProcessor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble import _nybble
    from nybble.runtime.images import Picture
    from nybble.tokens import PatchMethod

    Patches = PatchMethod | Mapping[str, Any] | str | os.PathLike[str]

__all__ = ["Encoding", "ImageEncoder", "Prediction"]

_MAX_LABEL = 200


@dataclass(frozen=True)
class Encoding:
    """What an encoder makes of images.

    Parameters
    ----------
    tokens
        The last hidden states, ``[images, tokens, hidden]``, as transformers'
        ``last_hidden_state``: learned tokens first, then the patches row by row.
    embedding
        One vector an image, ``[images, width]``: the class token of ViT, DeiT and DINOv2, the
        projected class token of CLIP, the attention-pooled tokens of SigLIP.
    logits
        Class scores ``[images, labels]``; ``None`` without a classifier.
    grid
        Rows and columns of patches.
    places
        With pruned tokens, which patch each token behind the learned ones is, ``[images, tokens]``,
        counted row by row; the largest number of the type for one that several were merged into
        and that is none of theirs (EViT). ``None`` where nothing was pruned.
    owners
        With pruned tokens, which token behind the learned ones holds each patch, ``[images,
        patches]``; the largest number of the type for a patch that left. Merged patches have the
        same owner.
    choosing_seconds
        With pruned tokens, the time in which tokens were scored, chosen and taken out; without that
        in which attention recorded what each token gives each, for methods that read that
        (Zero-TPrune).
    """

    tokens: npt.NDArray[np.float32]
    embedding: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None
    grid: tuple[int, int]
    places: npt.NDArray[np.uint32] | None = None
    owners: npt.NDArray[np.uint32] | None = None
    choosing_seconds: float | None = None

    @property
    def patches(self) -> npt.NDArray[np.float32]:
        """The patches' tokens, ``[images, rows, columns, hidden]``.

        Raises
        ------
        ArgumentError
            When some were pruned.
        """
        if self.places is not None:
            message = "patches: expected all of them, found pruned tokens; see places"
            raise ArgumentError(message)
        rows, cols = self.grid
        images, tokens, hidden = self.tokens.shape
        return self.tokens[:, tokens - rows * cols :].reshape(images, rows, cols, hidden)


@dataclass(frozen=True)
class Prediction:
    """A class and how likely it is.

    Parameters
    ----------
    index
        Its number.
    label
        Its name; ``LABEL_7`` where the model has none.
    score
        Its probability.
    """

    index: int
    label: str
    score: float


class ImageEncoder:
    """A model that reads images.

    Made by :func:`nybble.load`. One model can be used by several threads; they take turns.

    Parameters
    ----------
    raw
        The extension's encoder.
    path
        The folder it came from.
    tokens
        What :meth:`encode` does where it is told nothing else about tokens.
    """

    def __init__(self, raw: _nybble.Encoder, path: Path, tokens: Patches | None = None) -> None:
        self.raw = raw
        self.path = path
        self.tokens = tokens
        self.info: dict[str, Any] = json.loads(raw.info())

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        threads: int | None = None,
        *,
        kv: str | None = None,
        mmap: bool = True,
        tokens: Patches | None = None,
    ) -> ImageEncoder:
        """Load an encoder.

        Parameters
        ----------
        path
            A Hugging Face folder, compressed or not.
        threads
            Threads to use; by default ``NYBBLE_THREADS`` or the CPUs this process may use.
        kv
            How keys and values are held for the time of a layer: ``"f16"``, ``"f32"`` or
            ``"int8"``. By default ``"f16"`` for quantized models, else ``"f32"``.
        mmap
            Whether the weights are mapped or read.
        tokens
            Which patches deeper layers do without in every call, see :meth:`encode`; ``None`` for
            all patches.

        Raises
        ------
        NybbleError
            Every failure is one of its subclasses, see :mod:`nybble.errors`.
        """
        from nybble import _nybble

        place = Path(path).expanduser()
        if threads is not None:
            threads = count("threads", threads)
        model = cls(_nybble.Encoder.open(place, threads, kv, mmap), place, tokens)
        if tokens is not None:
            model.macs()  # what does not fit the model fails here
        return model

    @cached_property
    def processor(self) -> ImageProcessor:
        """How images are prepared, as the folder says."""
        return ImageProcessor.from_folder(self.path)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes."""
        config = read_json(self.path / "config.json", MAX_CONFIG)
        names = config.get("id2label")
        names = names if isinstance(names, dict) else {}
        return tuple(
            str(names.get(str(index), f"LABEL_{index}"))[:_MAX_LABEL]
            for index in range(int(self.info["labels"]))
        )

    def processor_for(self, size: int | tuple[int, int] | None = None) -> ImageProcessor:
        """Return how images are prepared for a height and width; as the folder says without."""
        if size is None:
            return self.processor
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2:
            message = f"size: expected height and width, found {size!r:.60}"
            raise ArgumentError(message)
        height, width = (count("size", side) for side in sides)
        return self.processor.at(height, width)

    def preprocess(
        self, images: Picture | Sequence[Picture], size: int | tuple[int, int] | None = None
    ) -> npt.NDArray[np.float32]:
        """Decode and prepare images.

        Parameters
        ----------
        images
            One image or several; see :func:`nybble.runtime.images.open_image`.
        size
            Height and width of the result in place of what the folder says, one number for both.

        Returns
        -------
        Values of shape ``[images, 3, height, width]``.

        Raises
        ------
        NybbleError
            For an image or a folder that cannot be used.
        """
        import numpy as np

        processor = self.processor_for(size)
        if not isinstance(images, (list, tuple)):
            images = [images]  # type: ignore[list-item]  # not a sequence, so a picture
        if not images:
            message = "images: expected at least one, found none"
            raise ArgumentError(message)
        prepared = [processor(image) for image in images]
        if len({pixels.shape for pixels in prepared}) > 1:
            message = "images: expected all of one size after preparation; encode them one by one"
            raise ArgumentError(message)
        return np.stack(prepared)

    def encode(
        self,
        images: Picture | Sequence[Picture] | npt.NDArray[np.float32],
        *,
        size: int | tuple[int, int] | None = None,
        tokens: Patches | None = None,
    ) -> Encoding:
        """Encode images.

        Parameters
        ----------
        images
            One image or several, prepared by :meth:`preprocess`; or an array of float32
            ``[images, channels, height, width]`` that is prepared already. Sides must be multiples
            of the patch; where they are not those of the training, positions are interpolated.
        size
            As for :meth:`preprocess`.
        tokens
            Which patches the deeper layers do without: a method in
            :data:`nybble.tokens.PATCH_METHODS`, its name, a mapping with its ``name`` and its
            settings, or the path of a JSON file with one. It is faster and changes the result. By
            default what the model was loaded with; ``"off"`` for all patches.

        Raises
        ------
        NybbleError
            For an image that cannot be read or has an impossible size, and for a method that does
            not fit the model.
        """
        import numpy as np

        if isinstance(images, np.ndarray) and images.ndim == 4:
            if images.dtype != np.float32:
                message = f"images: expected prepared values of float32, found {images.dtype}"
                raise ArgumentError(message)
            if size is not None:
                message = "size: expected none beside prepared values"
                raise ArgumentError(message)
            pixels: npt.NDArray[np.float32] = images  # type: ignore[assignment]  # just checked
        else:
            pixels = self.preprocess(images, size)  # type: ignore[arg-type]  # checked there
        states, embedding, logits, reduced = self.raw.encode(pixels, self._policy(tokens))
        places, owners, choosing = (None, None, None) if reduced is None else reduced
        high, wide = self.info["patch"]
        return Encoding(
            tokens=states,
            embedding=embedding,
            logits=logits if self.info["labels"] else None,
            grid=(pixels.shape[2] // high, pixels.shape[3] // wide),
            places=places,
            owners=owners,
            choosing_seconds=choosing,
        )

    def macs(
        self,
        size: int | tuple[int, int] | None = None,
        tokens: Patches | None = None,
    ) -> int:
        """Return the multiplications with additions that an image takes.

        Those of the linears and of attention; choosing tokens is not counted.

        Parameters
        ----------
        size
            Height and width; by default what the positions were learned for.
        tokens
            As for :meth:`encode`.
        """
        sides = self.info["image"] if size is None else size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        return self.raw.macs(count("size", height), count("size", width), self._policy(tokens))

    def classify(
        self,
        images: Picture | Sequence[Picture] | npt.NDArray[np.float32],
        top: int = 5,
        *,
        size: int | tuple[int, int] | None = None,
        tokens: Patches | None = None,
    ) -> list[list[Prediction]]:
        """Return the likeliest classes of each image, best first.

        Parameters
        ----------
        images, size, tokens
            As for :meth:`encode`.
        top
            Most classes to return.

        Raises
        ------
        UnsupportedError
            When the model has no classifier.
        """
        import numpy as np

        top = count("top", top)
        if not self.info["labels"]:
            message = f"{self.path}: classifying is not supported: the model has no classifier"
            raise UnsupportedError(message)
        logits = self.encode(images, size=size, tokens=tokens).logits
        assert logits is not None  # there are labels
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        # Of equal scores the first class counts.
        order = np.argsort(-shares, axis=1, kind="stable")[:, :top]
        return [
            [Prediction(int(i), self.labels[i], float(row[i])) for i in best]
            for row, best in zip(shares, order, strict=True)
        ]

    def _policy(self, tokens: Patches | None) -> str | None:
        """Return a policy of token reduction as the extension reads it."""
        from nybble.tokens.patches import patch_method

        tokens = self.tokens if tokens is None else tokens
        if tokens is None or (isinstance(tokens, str) and tokens == "off"):
            return None
        return json.dumps(patch_method(tokens).settings())

    def __repr__(self) -> str:
        return f"ImageEncoder({str(self.path)!r}, {self.info.get('family')})"
