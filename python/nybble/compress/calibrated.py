"""Rounding with calibration: one layer after another, each seeing what those before have become.

The pass comes before anything is written to the final folder. What it makes of a layer (integers,
and floats that a fold changed) goes to a file of a hidden folder beside the output, with the hidden
states that the next layer needs: a run that was stopped goes on from there, if source, recipe and
text are the same. The folder is removed once the model is written.

In memory there are one layer in float32 and the hidden states of all windows; twice those, where a
method compares with the original model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nybble import _nybble
from nybble.calibrate.layer import Layer
from nybble.calibrate.layers import Walk
from nybble.calibrate.stats import InputStats
from nybble.calibrate.text import CalibrationSet
from nybble.compress.masked import mask
from nybble.compress.plan import Item, Plan
from nybble.compress.recipe import Recipe
from nybble.compress.source import Source
from nybble.errors import FileError, FormatError
from nybble.quant.base import Floats, IntWeights
from nybble.quant.fold import pairs, rescale
from nybble.quant.scale_tuning import ScaleTuning
from nybble.quant.static import static_scale
from nybble.quant.trainable import Linear
from nybble.sparsity import Thresholds

if TYPE_CHECKING:
    import torch

__all__ = ["CalibratedPass", "Rounded"]


@dataclass(frozen=True)
class Rounded:
    """A matrix that the pass has rounded.

    Parameters
    ----------
    integers
        The matrix.
    error, norm
        Sums of squares of its error and of the weights that were rounded.
    output_error
        Relative squared error of the outputs, if the inputs' second moments were collected.
    input_scale
        The step of its inputs, if that is found beforehand.
    """

    integers: IntWeights
    error: float
    norm: float
    output_error: float | None
    input_scale: float | None


class CalibratedPass:
    """The pass over a model's layers, and what it leaves.

    Parameters
    ----------
    source
        The model.
    work
        What is to become of its tensors.
    recipe
        How.
    text
        What the layers are shown.
    out
        The final folder; results are kept beside it.
    threads
        Threads to use.
    tuning_text
        What the recipe's tuning is shown, if it has one.
    """

    def __init__(
        self,
        source: Source,
        work: Plan,
        recipe: Recipe,
        text: CalibrationSet,
        out: Path,
        threads: int | None = None,
        tuning_text: CalibrationSet | None = None,
    ) -> None:
        self.source = source
        self.text = text
        self.tuning_text = tuning_text
        self.threads = threads
        self.notes: set[str] = set()
        self._quantizer = recipe.weights.quantizer()
        self._fold = recipe.fold()
        self._tuner = recipe.tuner()
        self._tuned: dict[str, Floats] = {}
        self._items: dict[str, Item] = {
            item.tensor.removesuffix(".weight"): item for item in work.items
        }
        self._parts = source.plan()
        self.folder = out.absolute().parent / f".{out.name}.calibration-{self._key(recipe)}"
        self._matrices: dict[str, Path] = {}
        self._floats: dict[str, Path] = {}

    def _key(self, recipe: Recipe) -> str:
        """Name what the results depend on; of the weights, sizes and times stand for contents."""
        path = self.source.path
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        weights = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns)
            for file in files
            if file.suffix in (".safetensors", ".gguf", ".json")
        ]
        # Tunings start from the same integers.
        rest = replace(recipe, tuning=None).to_yaml()
        facts = [_nybble.version(), weights, rest, self.text.digest]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def run(self, *, progress: bool = True) -> None:
        """Round all layers, or those that an earlier run has not.

        Raises
        ------
        FormatError
            When a layer's activations are not finite.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise FileError(error.errno, error.strerror, str(self.folder)) from None
        walk = Walk(
            self.source.config,
            self._parts,
            {name: shape for name, (_, shape) in self.source.tensors.items()},
            self.source.tensor,
            self.threads,
        )
        hidden = walk.embed(self.text.windows)
        reference = None
        if "reference" in self._quantizer.needs:
            reference = [states.clone() for states in hidden]
        done = self._resume(walk, hidden, reference)
        with tqdm(
            total=len(walk),
            initial=done,
            desc="calibrate",
            unit="layer",
            disable=not progress,
            dynamic_ncols=True,
        ) as bar:
            for index in range(done, len(walk)):
                layer = walk.layer(index)
                self._layer(index, layer, hidden, reference)
                del layer
                walk.drop(index)
                if index + 1 < len(walk):
                    self._keep(index, hidden, reference)
                bar.update()
        for index in range(len(walk)):
            facts = _facts(self._file(index))
            self.notes.update(facts["notes"])
            self._matrices.update(dict.fromkeys(facts["matrices"], self._file(index)))
            self._floats.update(dict.fromkeys(facts["floats"], self._file(index)))

    def _layer(
        self,
        index: int,
        layer: Layer,
        hidden: list[torch.Tensor],
        reference: list[torch.Tensor] | None,
    ) -> None:
        stats, kept = self._original(layer, hidden, reference)
        changed = self._rescale(layer, stats, kept)
        facts: dict[str, Any] = {"matrices": {}, "notes": sorted(self.notes)}
        arrays: dict[str, Any] = {}
        every = range(len(layer.stages))
        for together in [[stage] for stage in every] if self._quantizer.stepwise else [every]:
            seen = {stage: self._see(layer, stage, hidden, kept[stage]) for stage in together}
            for stage in together:
                for name in layer.stages[stage]:
                    item = self._items[name]
                    if item.scheme is not None:
                        facts["matrices"][name] = self._round(layer, item, seen[stage], arrays)
        if not self._quantizer.stepwise:
            layer.forget()  # what was seen is of the layer before any of it was rounded
        floats = []
        for name in sorted(changed):
            known = self._items.get(name.removesuffix(".weight"))
            if known is not None and known.scheme is not None:
                continue
            values = layer.tensor(name)
            assert values is not None
            arrays[f"{name}.float"] = values
            floats.append(name)
        facts["floats"] = floats
        layer.outputs(hidden)
        arrays["facts"] = np.array(json.dumps(facts))
        self._save(self._file(index), arrays)

    def _original(
        self, layer: Layer, hidden: list[torch.Tensor], reference: list[torch.Tensor] | None
    ) -> tuple[list[InputStats], list[dict[int, Floats]]]:
        """Run the layer as it is on what comes before it in the original model, or else in this.

        Returns statistics for the fold and, with an original model, the inputs themselves: of each
        stage, by window.
        """
        fold = self._fold
        kept: list[dict[int, Floats]] = [{} for _ in layer.stages]
        if reference is None and fold is None:
            return [], kept
        needs = fold.needs if fold is not None else frozenset()
        stats: list[InputStats] = [
            InputStats(names[0], layer.weight(names[0]).shape[1], needs)
            if names
            else InputStats("", 0)
            for names in layer.stages
        ]
        for window, inputs, output in layer.trace(hidden if reference is None else reference):
            for stage, values in enumerate(inputs):
                if fold is not None and layer.stages[stage]:
                    stats[stage].update(values)
                if reference is not None:
                    kept[stage][window] = values
            if reference is not None:
                reference[window] = output
        return stats, kept

    def _rescale(
        self, layer: Layer, stats: list[InputStats], kept: list[dict[int, Floats]]
    ) -> set[str]:
        """Fold what can be folded; return the names of the tensors that changed."""
        fold = self._fold
        changed: set[str] = set()
        if fold is None:
            return changed
        found, notes = pairs(layer.parts, layer)
        self.notes.update(f"fold: {note}" for note in notes)
        for pair in found:
            if pair.kind not in fold.kinds:
                continue
            scheme = self._items[pair.consumers[0]].scheme
            if scheme is None:
                self.notes.add(
                    f"fold: {pair.consumers[0]} stays in float: its inputs keep their scale"
                )
                continue
            if fold.rounds_inputs and scheme.activations == 16:
                continue
            weights = [layer.weight(name) for name in pair.consumers]
            factors = fold.factors(pair, weights, stats[pair.stage], scheme)
            if (factors == 1).all():
                continue
            divisor = factors[pair.columns].astype(np.float32)
            for values in kept[pair.stage].values():
                values /= divisor
            changed.update(rescale(layer, pair, factors))
        return changed

    def _see(
        self, layer: Layer, stage: int, hidden: list[torch.Tensor], original: dict[int, Floats]
    ) -> InputStats | None:
        """Collect what the quantizer, and a step of the inputs, need of a stage's inputs."""
        needs = self._quantizer.needs
        schemes = [self._items[name].scheme for name in layer.stages[stage]]
        if any(scheme is not None and scheme.static for scheme in schemes):
            needs |= {"sample"}
        if not needs or not schemes:
            return None
        name = layer.stages[stage][0]
        stats = InputStats(name, layer.weight(name).shape[1], needs)
        for window, inputs in layer.inputs(stage, hidden):
            stats.update(inputs, original.pop(window, None))
        return stats

    def _round(
        self, layer: Layer, item: Item, inputs: InputStats | None, arrays: dict[str, Any]
    ) -> dict[str, Any]:
        """Round one matrix, put the result into the layer, and describe it."""
        assert item.scheme is not None
        weight = layer.weight(item.name)
        values = np.ascontiguousarray(weight)
        if not np.isfinite(values).all():
            row, col = np.argwhere(~np.isfinite(values))[0]
            message = (
                f"{self.source.path}: {item.tensor}: expected finite weights, "
                f"found {values[row, col]} at row {row}, column {col}"
            )
            raise FormatError(message)
        done = self._quantizer.quantize(values, item.scheme, inputs=inputs, threads=self.threads)
        error, norm = done.squared_error(values)
        output = None
        back = done.dequantize()
        if inputs is not None and inputs.gram.size:
            size = inputs.energy(values)
            output = inputs.energy(values - back) / size if size > 0 else 0.0
        weight[...] = back
        arrays[f"{item.name}.codes"] = done.codes
        arrays[f"{item.name}.scales"] = done.scales
        if done.zeros is not None:
            arrays[f"{item.name}.zeros"] = done.zeros
        step = None
        if item.scheme.static:
            assert inputs is not None  # text was asked for
            step = static_scale(inputs, item.scheme.activations)
        return {
            "input_scale": step,
            "bits": done.bits,
            "note": done.note,
            "error": error,
            "norm": norm,
            "output_error": output,
        }

    def tune(
        self, thresholds: Sequence[Thresholds] | None = None, *, progress: bool = True
    ) -> None:
        """Tune scales, zero points and gains, or read what an earlier run has found.

        Parameters
        ----------
        thresholds
            What the layers, as they are rounded, will take for zero.
        progress
            Show a progress bar on stderr.
        """
        tuner = self._tuner
        if tuner is None:
            return
        assert self.tuning_text is not None  # drawn for every recipe with a tuning
        # Thresholds follow from the recipe and the text, which the folder is named after.
        facts = json.dumps([repr(tuner), self.tuning_text.digest])
        file = self.folder / f"tuned-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.npz"
        try:
            with np.load(file) as stored:
                self._tuned = dict(stored)
        except (OSError, ValueError, zipfile.BadZipFile):
            found = self._fit(tuner, self.tuning_text, thresholds, progress=progress)
            self._save(file, found)
            with np.load(file) as stored:
                self._tuned = dict(stored)
        steps = self._tuned["divergences"]
        quarter = max(1, len(steps) // 4)
        before, after = steps[:quarter].mean(), steps[-quarter:].mean()
        self.notes.add(
            f"tuning: {len(steps)} steps; divergence from the original {before:.4f} nats a token "
            f"in the first quarter, {after:.4f} in the last; errors are those before it"
        )

    def _fit(
        self,
        tuner: ScaleTuning,
        text: CalibrationSet,
        thresholds: Sequence[Thresholds] | None,
        *,
        progress: bool,
    ) -> dict[str, npt.NDArray[Any]]:
        shapes = {name: shape for name, (_, shape) in self.source.tensors.items()}

        def read(name: str, start: int, stop: int | None) -> Floats:
            folded = self.floats(name)
            return self.source.tensor(name, start, stop) if folded is None else folded[start:stop]

        walks = [
            Walk(self.source.config, self._parts, shapes, reader, self.threads)
            for reader in (self.source.tensor, read)
        ]
        original, model = (walk.whole() for walk in walks)
        linears = {}
        for name in self._matrices:
            done, scheme = self.matrix(name), self._items[name].scheme
            assert done is not None
            assert scheme is not None
            linears[name] = Linear(done.integers, scheme, done.input_scale)
        gains = [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() == 1 and name.endswith(".weight")
        ]
        torch = walks[0].torch

        def masks(model: Any) -> None:
            if thresholds is not None:
                mask(torch, model, self._parts["layers"], thresholds)

        found = tuner.fit(
            torch, original, model, linears, gains, text.windows, masks=masks, progress=progress
        )
        arrays = {f"{name}.scales": scales for name, scales in found.scales.items()}
        arrays |= {f"{name}.zeros": zeros for name, zeros in found.zeros.items()}
        arrays |= {f"{name}.float": gain for name, gain in found.gains.items()}
        return {**arrays, "divergences": np.array(found.divergences)}

    # What is on the disk.

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:04}.npz"

    def _states(self, index: int) -> Path:
        return self.folder / f"states-{index:04}.npy"

    def _save(self, path: Path, arrays: Mapping[str, Any]) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                np.savez(file, **arrays)
            part.replace(path)
        except OSError as error:
            raise FileError(error.errno, error.strerror, str(path)) from None

    def _keep(
        self, index: int, hidden: list[torch.Tensor], reference: list[torch.Tensor] | None
    ) -> None:
        """Write the states after a layer, then forget those before it."""
        states = [*hidden, *(reference or [])]
        path = self._states(index)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        shape = (len(states), *states[0].shape[1:])
        try:
            with part.open("wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for state in states:
                    file.write(np.ascontiguousarray(state.numpy()).data)
            part.replace(path)
        except OSError as error:
            raise FileError(error.errno, error.strerror, str(path)) from None
        self._states(index - 1).unlink(missing_ok=True)

    def _resume(
        self, walk: Walk, hidden: list[torch.Tensor], reference: list[torch.Tensor] | None
    ) -> int:
        """Put the states of the last finished layer in place; return how many are finished."""
        for index in range(len(walk) - 2, -1, -1):
            try:
                stored = np.load(self._states(index), mmap_mode="r")
                for finished in range(index + 1):
                    _facts(self._file(finished))
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                continue  # not there, or damaged: what it held is made again
            count = len(hidden)
            for i in range(count):
                hidden[i] = walk.torch.from_numpy(np.array(stored[i : i + 1]))
                if reference is not None:
                    reference[i] = walk.torch.from_numpy(
                        np.array(stored[count + i : count + i + 1])
                    )
            return index + 1
        return 0

    def matrix(self, name: str) -> Rounded | None:
        """Return what became of a linear; ``None`` if the pass did not round it."""
        if name not in self._matrices:
            return None
        with np.load(self._matrices[name]) as stored:
            facts = json.loads(str(stored["facts"]))["matrices"][name]
            zeros = f"{name}.zeros"
            scales = stored[f"{name}.scales"]
            integers = IntWeights(
                stored[f"{name}.codes"],
                self._tuned.get(f"{name}.scales", scales),
                self._tuned.get(zeros, stored[zeros] if zeros in stored.files else None),
                facts["bits"],
                facts["note"],
            )
        return Rounded(
            integers,
            facts["error"],
            facts["norm"],
            facts["output_error"],
            facts["input_scale"],
        )

    def floats(self, tensor: str) -> Floats | None:
        """Return a tensor that stays in float and that a fold or a tuning has changed, or None."""
        if f"{tensor}.float" in self._tuned:
            return np.asarray(self._tuned[f"{tensor}.float"])
        if tensor not in self._floats:
            return None
        with np.load(self._floats[tensor]) as stored:
            return np.asarray(stored[f"{tensor}.float"])

    def remove(self) -> None:
        """Remove the results, and those of other recipes that were meant for the same folder."""
        name, _, _ = self.folder.name.rpartition("-")
        for folder in self.folder.parent.glob(f"{name}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _facts(path: Path) -> dict[str, Any]:
    """Return what a layer's file says about its arrays."""
    with np.load(path) as stored:
        facts: dict[str, Any] = json.loads(str(stored["facts"]))
    return facts
