"""What a compression did, tensor by tensor: ``report.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Report", "TensorReport"]

VERSION = 1


@dataclass(frozen=True)
class TensorReport:
    """One matrix or vector.

    Parameters
    ----------
    name
        The module's path, or the tensor's name where it stays in float.
    role
        What it is for: ``qkv``, ``out``, ``gate_up``, ``down``, ``project``, ``head``,
        ``embedding``, ``position`` or ``other``.
    shape
        Its shape.
    scheme
        What it became, in words: a scheme or a float type.
    error
        Relative squared error ``sum (w - w')^2 / sum w^2``.
    bits_per_weight
        Bits of the file a weight, scales and zero points included.
    size
        Bytes in the file.
    seconds
        Time it took.
    note
        Why it differs from what was asked for, if it does.
    output_error
        Relative squared error of the linear's outputs for the inputs of the calibration,
        ``tr(D H D^T) / tr(W H W^T)`` with ``D = w - w'``; ``None`` if those were not looked at.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    scheme: str
    error: float
    bits_per_weight: float
    size: int
    seconds: float
    note: str = ""
    output_error: float | None = None


@dataclass
class Report:
    """A whole compression.

    Parameters
    ----------
    source
        Name of the folder or file that was read (not its path).
    source_files
        Names and SHA-256 of its weights and configuration.
    version
        nybble's version.
    settings
        The recipe in full.
    family
        The model's family.
    tensors
        Every tensor, in the order of the work.
    left_out
        Tensors of the source that the model does not need.
    notes
        Departures from the recipe.
    size_before
        Bytes of the source's tensors.
    size_after
        Bytes of the written tensors.
    parameters
        Number of weights.
    seconds
        Time of the whole.
    calibration
        Which text was looked at: its files' SHA-256, number of tokens, seed, and the SHA-256 of the
        tokens; or which images, likewise with their size; ``None`` if none was.
    prune
        What was taken out before: the method with its settings, what share of the parameters it
        came to, and for each layer what is left and the relative squared error of the outputs of
        linears that changed, on some of the calibration inputs; where something was trained
        afterwards, the loss on held-out windows before and after. ``None`` if nothing was.
    """

    source: str
    source_files: dict[str, str]
    version: str
    settings: dict[str, Any]
    family: str
    tensors: list[TensorReport] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    size_before: int = 0
    size_after: int = 0
    parameters: int = 0
    seconds: float = 0.0
    calibration: dict[str, Any] | None = None
    prune: dict[str, Any] | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits of the written file a weight, everything included."""
        return 8 * self.size_after / self.parameters if self.parameters else 0.0

    def mean_error(self) -> float:
        """Return the mean relative squared error of the layers' linears."""
        roles = ("qkv", "out", "gate_up", "down", "project")
        errors = [t.error for t in self.tensors if t.role in roles]
        return sum(errors) / len(errors) if errors else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        values = dataclasses.asdict(self)
        tensors = values.pop("tensors")
        return {
            "report_version": VERSION,
            **values,
            "bits_per_weight": self.bits_per_weight,
            "mean_error": self.mean_error(),
            "tensors": tensors,
        }

    def to_text(self) -> str:
        """Return the content of ``report.json``."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
