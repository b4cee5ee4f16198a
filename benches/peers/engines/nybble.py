"""nybble itself, through the calls `nybble bench` times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benches.peers.engines.base import Engine, Format, Session

_RECIPES: dict[str, dict[str, Any]] = {
    "W4A8": {"weights": {"bits": 4}},
    "W4A8, 4-bit head": {
        "weights": {"bits": 4},
        "embedding": {"bits": 4},
        "head": {"bits": 4},
    },
    "W8A8": {"weights": {"bits": 8}},
}


class Nybble(Engine):
    """The project's own run-time."""

    name = "nybble"
    packages = ("nybble",)
    formats = (
        Format("W4A8", 4, "groups of 32 with zero points, embedding and head 8 bits: the default"),
        Format("W4A8, 4-bit head", 4, "the same, embedding and head 4 bits"),
        Format("W8A8", 8, "groups of 32, symmetric"),
        Format("float", 16, "the weights as they come"),
    )
    timed = "one forward call a step, logits of the last token copied to Python"

    def fingerprint(self) -> str:
        """Return the version and the build: what `compress` writes may change between two."""
        from nybble import _nybble

        build = Path(_nybble.__file__).stat()
        return f"{self.available()} {build.st_size} {build.st_mtime_ns}"

    def needs_conversion(self, form: str) -> bool:
        """Float weights are read from the Hugging Face folder."""
        return form in _RECIPES

    def prepare(self, source: Path, form: str, target: Path) -> None:
        """Run `nybble compress`."""
        import nybble

        # `target` exists, and compress makes its folder itself.
        nybble.compress(source, target / "model", recipe=_RECIPES[form], progress=False)

    def open(self, model: Path, form: str, threads: int, context: int) -> Session:
        """Load the folder."""
        import nybble

        folder = model / "model" if self.needs_conversion(form) else model
        return _Session(nybble.load(folder, threads), context)


class _Session(Session):
    def __init__(self, model: Any, context: int) -> None:
        del context  # the cache grows
        self.weight_bytes = sum(model.info["weight_bytes"].values())
        self._session = model.session()

    def reset(self) -> None:
        self._session.raw.truncate(0)

    def prompt(self, ids: list[int]) -> None:
        import numpy as np

        self._session.raw.forward(np.array(ids, dtype=np.uint32), "last")

    def generate(self, ids: list[int]) -> None:
        import numpy as np

        forward = self._session.raw.forward
        trace = np.array(ids, dtype=np.uint32)
        for index in range(len(trace)):
            forward(trace[index : index + 1], "last")
