"""Training after a cut, on the folder that the cut has written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble import _nybble
from nybble.calibrate.text import CalibrationSet
from nybble.compress.source import Source
from nybble.errors import ArgumentError, FormatError
from nybble.eval.losses import token_losses
from nybble.prune import RECOVERIES
from nybble.prune.evidence import Subject
from nybble.prune.recovery import Patient, Recovery

__all__ = ["HELD", "recover"]

HELD = 4
"""Windows that are not trained on: the loss of their tokens is what is reported."""

_WEIGHTS = "model.safetensors"


def recover(
    folder: Path,
    patient: Patient,
    recovery: Recovery,
    text: CalibrationSet,
    threads: int | None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a pruned model and write its weights anew; return what a report says of it.

    Parameters
    ----------
    folder
        The pruned model, in one file of float32.
    patient
        The same beside its original.
    recovery
        How.
    text
        Text for it; the first windows, up to :data:`HELD` and at most half, are held out.
    threads
        Threads to use.
    progress
        Show a progress bar on stderr.

    Raises
    ------
    ArgumentError
        When there are fewer than two windows of text.
    FormatError
        When a loss is not finite.
    """
    if len(text.windows) < 2:
        message = f"recovery: expected at least 2 windows of text, found {len(text.windows)}"
        raise ArgumentError(message)
    held = min(HELD, len(text.windows) // 2)
    tests, windows = text.windows[:held], text.windows[held:]
    before = _loss(folder, tests, threads)
    changed = recovery.recover(patient, windows, progress=progress)
    tensors = Source(folder).tensors
    fresh = folder / f"{_WEIGHTS}.new"
    writer = _nybble.SafeTensorsWriter(str(fresh), [(n, "F32", s) for n, (_, s) in tensors.items()])
    for name in tensors:
        values = changed.get(name)
        if values is None:
            values = patient.pruned.weight(name)
        elif not np.isfinite(values).all():
            message = f"recovery: {name}: expected finite weights, found others"
            raise FormatError(message)
        writer.write(name, np.ascontiguousarray(values, dtype="<f4").data)
    writer.finish()
    fresh.replace(folder / _WEIGHTS)
    name = next(name for name, kind in RECOVERIES.items() if kind is type(recovery))
    return {
        "method": name,
        "settings": dataclasses.asdict(recovery),
        "text": text.to_json(),
        "tokens": int(windows.size),
        "loss": {
            "before": before,
            "after": _loss(folder, tests, threads),
            "held_out_tokens": int(tests[:, 1:].size),
        },
    }


def subject(folder: Path, threads: int | None) -> Subject:
    """Return the model of a folder."""
    source = Source(folder)
    shapes = {name: tuple(shape) for name, (_, shape) in source.tensors.items()}
    return Subject(source.config, source.plan(), shapes, source.tensor, threads)


def _loss(folder: Path, windows: npt.NDArray[np.int64], threads: int | None) -> float:
    """Return the mean loss of predicted tokens, in nats, as the run time computes it."""
    model = _nybble.Model.open(str(folder), threads)
    total = 0.0
    for window in windows:
        logits = model.session().forward(window.astype(np.uint32), "all")
        total += float(token_losses(logits[:-1], window[1:]).sum())
    loss = total / windows[:, 1:].size
    if not np.isfinite(loss):
        message = f"recovery: expected a finite loss on text, found {loss}"
        raise FormatError(message)
    return loss
