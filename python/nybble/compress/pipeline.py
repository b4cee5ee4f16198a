"""The work itself: read, round, write, check, publish.

Nothing is ever in memory but one block of rows: the plan gives every size, so the headers are
written first and each block goes to its place in the file as soon as it is rounded. All files are
made in a hidden folder beside the final one, which takes the final name in one step after the
run-time's own reader has opened it. A run that fails or is killed leaves nothing under that name.

Where a recipe needs calibration, :mod:`nybble.compress.calibrated` rounds the layers before that;
what is not among its results (embedding, head, vectors) is read from the source as ever.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nybble import _nybble
from nybble.calibrate import images as pictures
from nybble.calibrate.images import ImageSet
from nybble.calibrate.text import CalibrationSet, draw
from nybble.compress import files, plan
from nybble.compress.calibrated import CalibratedPass
from nybble.compress.plan import BYTES, Item, Plan
from nybble.compress.pruned import PrunedModel
from nybble.compress.recipe import Recipe
from nybble.compress.recovered import HELD
from nybble.compress.report import Report, TensorReport
from nybble.compress.source import Source
from nybble.errors import ArgumentError, ConfigError, FormatError, UnsupportedError
from nybble.formats.packing import pack, pack_zeros, rows_per_word, words
from nybble.prune import Recovery
from nybble.quant.base import Floats, IntWeights, Quantizer, Scheme
from nybble.runtime.images import ImageProcessor
from nybble.runtime.tokenizer import Tokenizer, from_folder, from_gguf
from nybble.sparsity import SparsityMethod, Thresholds, find, write

__all__ = ["SECTION_VERSION", "SHARD", "run"]

SHARD = 5_000_000_000
"""Bytes of a weight file at most."""
SECTION_VERSION = 1
"""Version of the ``nybble`` section of ``config.json``."""

_BLOCK = 64 << 20  # bytes of float32 in memory at a time
_ROWS = 32  # blocks are multiples of this many rows, so that zero points fill whole words
_SPARE = 1 << 30  # memory allowed besides the largest file


def run(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    calibration: Sequence[Path] = (),
    overwrite: bool = False,
    threads: int | None = None,
    progress: bool = True,
    shard: int = SHARD,
) -> Report:
    """Compress a model.

    Parameters
    ----------
    source
        A Hugging Face folder or a GGUF file.
    out
        The folder to make.
    recipe
        What to do.
    calibration
        Text files, or for an image encoder images, if the recipe needs some.
    overwrite
        Replace `out` if it is a model folder already.
    threads
        Threads to use; the result does not depend on it.
    progress
        Show a progress bar on stderr.
    shard
        Most bytes of one weight file.
    """
    began = time.perf_counter()
    _check_places(source, out)
    original = checkpoint = Source(source)
    parts = checkpoint.plan()
    images = parts["kind"] == "encoder"
    if images:
        _check_encoder(recipe)
    elif recipe.attention.bits == 7:
        message = "recipe: attention.bits 7 is supported for image encoders alone"
        raise UnsupportedError(message)
    _check_calibration(recipe, calibration, images=images)
    pruned = shown = recovery = training = None
    looked_at: CalibrationSet | ImageSet | None = None
    if (pruner := recipe.pruner()) is not None:
        if pruner.reads_text and images:
            looked_at = _draw_images(original, recipe, calibration)
        elif pruner.reads_text:
            looked_at = shown = _draw(original, recipe, calibration)
        if (recovery := recipe.recovery()) is not None:
            training = _recovery_text(original, recovery, recipe, calibration)
        pruned = PrunedModel(original, pruner, looked_at, out, threads, recovery, training)
        checkpoint = pruned.make(progress=progress)
        parts = checkpoint.plan()
    work = plan.make(parts, checkpoint.tensors, recipe, original.kind)
    report = Report(
        source=source.resolve().name,
        source_files={},
        version=_nybble.version(),
        settings=dataclasses.asdict(recipe),
        family=work.family,
        left_out=list(work.left_out),
        notes=sorted({f"{item.role}: {item.note}" for item in work.items if item.note}),
        parameters=sum(item.weights for item in work.items),
        size_after=sum(item.size for item in work.items),
        prune=None if pruned is None else pruned.report,
    )
    if recovery is not None and training is not None:
        _note_shortage(report, "recovery", recovery.tokens, training)
    passed = None
    if isinstance(looked_at, ImageSet):
        report.calibration = looked_at.to_json()
    elif calibration and recipe.needs_calibration() != "prune.recovery":
        shown = shown or _draw(original, recipe, calibration)
        _note_shortage(report, "calibration", recipe.calibration.tokens, shown)
        report.calibration = shown.to_json()
        if recipe.needs_layers():
            tuning = _tuning_text(original, recipe, calibration, report)
            passed = CalibratedPass(checkpoint, work, recipe, shown, out, threads, tuning)
    weight_files = files.weight_files(source)
    report.size_before = sum(f.stat().st_size for f in weight_files if f.suffix != ".json")
    with (
        _nybble.StagedFolder(str(out), overwrite) as staged,
        _hashes(weight_files) as hashes,
    ):
        folder = Path(staged.path)
        method, thresholds = recipe.sparsifier(), None
        quantizer = recipe.weights.quantizer()
        config = _config(checkpoint.config, work, recipe.run_settings(images=images))
        dense = {**config, "nybble": {**config["nybble"], "run": {}}}
        if passed is not None:
            passed.run(progress=progress)
            if shown is not None and method is not None and recipe.tuner() is not None:
                # What will run is what is tuned: thresholds come before, from the model as rounded.
                with tempfile.TemporaryDirectory(dir=passed.folder) as place:
                    writing = _Writing(checkpoint, quantizer, threads, lambda _: None, passed)
                    _write_weights(writing, work, Path(place), shard, [])
                    files.write_text(Path(place) / "config.json", json.dumps(dense))
                    thresholds = _thresholds(Path(place), method, shown, threads, progress)
            passed.tune(thresholds, progress=progress)
            report.notes = sorted({*report.notes, *passed.notes})
        with tqdm(
            total=report.parameters,
            desc="compress",
            unit="w",
            unit_scale=True,
            disable=not progress,
            dynamic_ncols=True,
        ) as bar:
            writing = _Writing(checkpoint, quantizer, threads, bar.update, passed)
            _write_weights(writing, work, folder, shard, report.tensors)
        if original.kind == "gguf":
            metadata = original.gguf_metadata()
            files.rebuild_companions(metadata, original.config, str(source), folder)
        else:
            files.copy_companions(source, folder)
        files.write_text(folder / "recipe.yaml", recipe.to_yaml())
        report.source_files = {name: future.result() for name, future in hashes.items()}
        if shown is not None and method is not None:
            if thresholds is None:
                files.write_text(folder / "config.json", json.dumps(dense, indent=2) + "\n")
                thresholds = _thresholds(folder, method, shown, threads, progress)
            write(folder, thresholds)
            report.notes.append(_sparse_note(thresholds))
        report.seconds = time.perf_counter() - began
        files.write_text(folder / "report.json", report.to_text())
        files.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        _check(folder, work, max((f.stat().st_size for f in weight_files), default=0), threads)
        if pruned is not None:
            pruned.keep_plan(folder)
        staged.commit()
    for made in (passed, pruned):
        if made is not None:
            made.remove()
    return report


def _check_calibration(recipe: Recipe, calibration: Sequence[Path], *, images: bool) -> None:
    needed = recipe.needs_calibration()
    if needed and not calibration:
        message = f"recipe: {needed} looks at text: give a file of it (--calibration FILE)"
        if images:
            message = f"recipe: {needed} looks at images: give a folder, a zip archive or files of "
            message += "them (--calibration DIR)"
        raise ConfigError(message)
    if calibration and not needed:
        what = "images were" if images else "text was"
        message = f"calibration: {what} given, but nothing in the recipe looks at it"
        raise ArgumentError(message)
    wrong = next((path for path in calibration if pictures.is_images(path)), None)
    if wrong is not None and not images:
        found = "a folder" if wrong.is_dir() else f"a file that ends in {wrong.suffix}"
        message = f"{wrong}: expected text for a language model, found {found}"
        raise ArgumentError(message)


def _tokenizer(source: Source) -> Tokenizer:
    if source.kind == "gguf":
        return from_gguf(source.gguf_metadata(), str(source.path))
    return from_folder(source.path)


def _context(source: Source, wanted: int) -> int:
    limit = source.config.get("max_position_embeddings") or source.config.get("n_positions")
    return min(wanted, limit) if isinstance(limit, int) else wanted


def _draw(source: Source, recipe: Recipe, calibration: Sequence[Path]) -> CalibrationSet:
    """Draw the text that a language model is shown."""
    wanted = recipe.calibration
    return draw(
        calibration,
        _tokenizer(source),
        tokens=wanted.tokens,
        context=_context(source, wanted.context),
        seed=wanted.seed,
    )


def _draw_images(source: Source, recipe: Recipe, calibration: Sequence[Path]) -> ImageSet:
    """Draw the images that an encoder is shown."""
    wanted = recipe.calibration
    return pictures.draw(
        calibration,
        ImageProcessor.from_folder(source.path),
        images=wanted.images,
        seed=wanted.seed,
        patch=_patch(source.config),
    )


def _patch(config: Mapping[str, Any]) -> int:
    sizes = config.get("vision_config")
    found = (sizes if isinstance(sizes, Mapping) else config).get("patch_size", 16)
    return math.lcm(*found) if isinstance(found, list) else int(found)


def _check_encoder(recipe: Recipe) -> None:
    key = "prune.recovery" if recipe.recovery() is not None else recipe.needs_layers()
    key = key or ("sparsity" if recipe.sparsity is not None else "")
    if key:
        message = f"recipe: {key} is not supported for image encoders: it looks at text"
        raise UnsupportedError(message)
    if recipe.tokens is not None:
        message = "recipe: tokens is not supported for image encoders: it is about texts"
        raise UnsupportedError(message)


def _tuning_text(
    source: Source, recipe: Recipe, calibration: Sequence[Path], report: Report
) -> CalibrationSet | None:
    """Draw what a tuning is shown besides."""
    if (tuner := recipe.tuner()) is None:
        return None
    shown = draw(
        calibration,
        _tokenizer(source),
        tokens=tuner.tokens,
        context=_context(source, tuner.context),
        seed=recipe.calibration.seed + 1,
    )
    _note_shortage(report, "tuning", tuner.tokens, shown)
    report.calibration = {**(report.calibration or {}), "tuning": shown.to_json()}
    return shown


def _recovery_text(
    source: Source, recovery: Recovery, recipe: Recipe, calibration: Sequence[Path]
) -> CalibrationSet:
    """Draw what a recovery is trained on, and some windows that it is not."""
    context = _context(source, recovery.context)
    return draw(
        calibration,
        _tokenizer(source),
        tokens=recovery.tokens + HELD * context,
        context=context,
        seed=recipe.calibration.seed + 2,
    )


def _thresholds(
    folder: Path,
    method: SparsityMethod,
    text: CalibrationSet,
    threads: int | None,
    progress: bool,
) -> list[Thresholds]:
    """Find thresholds for weights that are written."""
    model = _nybble.Model.open(str(folder), threads)
    return find(method, model, text.windows, progress=progress)


def _sparse_note(thresholds: Sequence[Thresholds]) -> str:
    sizes = [1 if layer.neurons is None else len(layer.neurons) for layer in thresholds]
    skipped = 1 - float(np.average([layer.active for layer in thresholds], weights=sizes))
    return f"sparsity: {100 * skipped:.1f} % of the neurons are 0 on the calibration text"


def _note_shortage(report: Report, what: str, wanted: int, text: CalibrationSet) -> None:
    if text.windows.size < wanted:
        report.notes.append(
            f"{what}: {text.windows.size} tokens of the {wanted} asked for: "
            f"the text fills no more windows of {text.windows.shape[1]}"
        )


def _check_places(source: Path, out: Path) -> None:
    here, there = source.resolve(), out.resolve()
    if here == there or here.is_relative_to(there):
        message = f"out: expected another place than the source {source}, found {out}"
        raise ArgumentError(message)
    if there.is_relative_to(here) and here.is_dir():
        message = f"out: expected a place outside the source {source}, found {out}"
        raise ArgumentError(message)


@contextmanager
def _hashes(paths: list[Path]) -> Iterator[dict[str, Future[str]]]:
    """Hash files beside the work; give up when the work ends early."""
    stop = Event()
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        yield {path.name: pool.submit(files.digest, path, stop.is_set) for path in paths}
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _write_weights(
    writing: _Writing, work: Plan, folder: Path, shard: int, reports: list[TensorReport]
) -> None:
    shards = work.shards(shard)
    places: dict[str, str] = {}
    for number, items in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        entries = [entry for item in items for entry in item.entries()]
        places.update(dict.fromkeys((entry[0] for entry in entries), name))
        writer = _nybble.SafeTensorsWriter(str(folder / name), entries)
        reports.extend(writing.write(item, writer) for item in items)
        writer.finish()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(item.size for item in work.items)},
            "weight_map": dict(sorted(places.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        files.write_text(folder / "model.safetensors.index.json", text)


class _Writing:
    """Moves tensors from the source into a file.

    Parameters
    ----------
    source
        Where the weights come from.
    quantizer
        The method.
    threads
        Threads it may use.
    advance
        Told the number of weights done.
    passed
        What calibration has rounded already.
    """

    def __init__(
        self,
        source: Source,
        quantizer: Quantizer,
        threads: int | None,
        advance: Callable[[int], object],
        passed: CalibratedPass | None = None,
    ) -> None:
        self.source = source
        self.quantizer = quantizer
        self.threads = threads
        self.advance = advance
        self.passed = passed

    def write(self, item: Item, writer: _nybble.SafeTensorsWriter) -> TensorReport:
        """Write what an item becomes; report it."""
        began = time.perf_counter()
        note, output_error = item.note, None
        rounded = None if self.passed is None else self.passed.matrix(item.name)
        if item.scheme is None:
            error, norm = self._float(item, writer)
        elif rounded is not None:
            self._store(item, item.scheme, 0, rounded.integers, writer)
            if rounded.input_scale is not None:
                step = np.array([rounded.input_scale], dtype="<f4")
                writer.write(f"{item.name}.input_scale", step.data)
            error, norm, output_error = rounded.error, rounded.norm, rounded.output_error
            note = "; ".join(text for text in (note, rounded.integers.note) if text)
            self.advance(item.weights)
        else:
            error, norm = self._quantized(item, item.scheme, writer)
        if item.scheme is not None:
            writer.write(f"{item.name}.weight_shape", np.array(item.shape, dtype="<i8").data)
        return TensorReport(
            name=item.name,
            role=item.role,
            shape=item.shape,
            scheme=item.dtype.lower() if item.scheme is None else item.scheme.describe(),
            error=error / norm if norm > 0 else 0.0,
            bits_per_weight=8 * item.size / item.weights if item.weights else 0.0,
            size=item.size,
            seconds=time.perf_counter() - began,
            note=note,
            output_error=output_error,
        )

    def _blocks(self, item: Item, *, whole: bool = False) -> Iterator[tuple[int, Floats]]:
        """Rows of an item, a block at a time, and the first one's number."""
        *outer, cols = item.shape
        rows = int(np.prod(outer)) if outer else 1
        folded = None if self.passed is None else self.passed.floats(item.tensor)
        step = max(rows, 1) if whole else max(_ROWS, _BLOCK // (4 * max(1, cols)) // _ROWS * _ROWS)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            block = self.source.rows(item, start, stop)
            if folded is not None:
                block = folded.reshape(rows, -1)[start:stop]
            if not np.isfinite(block).all():
                row, col = np.argwhere(~np.isfinite(block))[0]
                message = (
                    f"{self.source.path}: {item.tensor}: expected finite weights, "
                    f"found {block[row, col]} at row {start + row}, column {col}"
                )
                raise FormatError(message)
            yield start, block
            self.advance(block.size)

    def _quantized(
        self, item: Item, scheme: Scheme, writer: _nybble.SafeTensorsWriter
    ) -> tuple[float, float]:
        total = np.zeros(2)
        for start, block in self._blocks(item, whole=not self.quantizer.by_rows):
            done = self.quantizer.quantize(block, scheme, threads=self.threads)
            self._store(item, scheme, start, done, writer)
            total += done.squared_error(block)
        return float(total[0]), float(total[1])

    def _store(
        self,
        item: Item,
        scheme: Scheme,
        start: int,
        done: IntWeights,
        writer: _nybble.SafeTensorsWriter,
    ) -> None:
        """Put the integers of rows from `start` on in their places."""
        name, cols = item.name, item.shape[1]
        bits = scheme.stored_bits
        groups, row_bytes = scheme.groups(cols), 4 * words(cols, bits)
        # The middle code stays the middle code.
        middle = (1 << bits - 1) - (1 << scheme.bits - 1)
        packed = pack(done.codes + np.uint8(middle), bits)
        writer.write_at(f"{name}.weight_packed", start * row_bytes, packed.data)
        scales = done.scales.astype("<f2")
        writer.write_at(f"{name}.weight_scale", start * groups * 2, scales.data)
        if done.zeros is None:
            return
        if scheme.zeros == "sixteenths":
            zeros = (done.zeros - 2 ** (bits - 1)).astype("<f2")
            writer.write_at(f"{name}.weight_zero_point", start * groups * 2, zeros.data)
        else:
            word = start // rows_per_word(bits)
            packed = pack_zeros(done.zeros.astype(np.uint8), bits)
            writer.write_at(f"{name}.weight_zero_point", word * groups * 4, packed.data)

    def _float(self, item: Item, writer: _nybble.SafeTensorsWriter) -> tuple[float, float]:
        size, row = BYTES[item.dtype], item.shape[-1] if item.shape else 1
        error = norm = 0.0
        for start, block in self._blocks(item):
            stored, back = _narrowed(block, item.dtype)
            if not np.isfinite(back).all():
                message = (
                    f"{self.source.path}: {item.tensor}: expected weights within the range of "
                    f"{item.dtype}, found {np.abs(block).max()}; set floats to another type"
                )
                raise FormatError(message)
            writer.write_at(item.tensor, start * row * size, stored.data)
            if item.stored != item.dtype:
                error += float(np.square(block - back).sum(dtype=np.float64))
            norm += float(np.square(block).sum(dtype=np.float64))
        return error, norm


def _narrowed(values: Floats, dtype: str) -> tuple[npt.NDArray[Any], Floats]:
    """Return floats rounded to a type, as stored and as float32."""
    if dtype == "F32":
        return values.astype("<f4"), values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        return half, half.astype(np.float32)
    # bfloat16 is the upper half of a float32; rounding to even carries into it.
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    upper = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return upper, (upper.astype("<u4") << 16).view("<f4")


def _config(source: dict[str, Any], work: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    dropped = ("_name_or_path", "_model_name_or_path", "torch_dtype", "nybble")
    config = {name: value for name, value in source.items() if name not in dropped}
    section = work.quantization_config()
    types = {item.dtype for item in work.items if item.scheme is None and len(item.shape) > 1}
    if section is None and len(types) == 1:
        names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
        config["dtype"] = names[types.pop()]
    else:
        # Whoever unpacks the integers computes in this type: the source's own.
        config["dtype"] = source.get("dtype") or source.get("torch_dtype") or "float32"
    if section is not None:
        config["quantization_config"] = section
    config["nybble"] = {"version": SECTION_VERSION, "created_by": f"nybble {_nybble.version()}"}
    if (structure := (source.get("nybble") or {}).get("structure")) is not None:
        config["nybble"]["structure"] = structure
    if settings:
        config["nybble"]["run"] = settings
    return config


def _check(folder: Path, work: Plan, largest: int, threads: int | None) -> None:
    """Open the folder as it will be opened to run."""
    checkpoint = _nybble.Checkpoint.open(str(folder))
    found = checkpoint.tensors()
    reads_images = json.loads(checkpoint.plan())["kind"] == "encoder"
    for item in work.items:
        for name, dtype, shape in item.entries():
            if name not in found or found[name] != (dtype, list(shape)):
                message = (
                    f"{folder}: {name}: expected {dtype} {list(shape)} after writing, "
                    f"found {found.get(name)}"
                )
                raise FormatError(message)
    del checkpoint
    size = sum(item.size for item in work.items)
    # A run-time model is the file's pages and the packed weights. Where that would need more memory
    # than compressing itself may, the names, types and shapes above have to do.
    if 2 * size <= 1.3 * largest + _SPARE:
        model = _nybble.Encoder if reads_images else _nybble.Model
        model.open(str(folder), threads)
