"""Pruning comes first: what it leaves is a model of its own, which is then compressed as any other.

That model is written, in float32, into a hidden folder beside the output, and removed once the
output is there. A run that was stopped finds it again if source, settings and text are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nybble import _nybble
from nybble.calibrate.images import ImageSet
from nybble.calibrate.text import CalibrationSet
from nybble.compress import files
from nybble.compress.recovered import recover, subject
from nybble.compress.source import Source
from nybble.errors import ConfigError, UnsupportedError
from nybble.formats.ragged import FAMILIES, KEYS, plain, structure_of
from nybble.prune import (
    METHODS,
    Lens,
    Patient,
    PruneMethod,
    Recovery,
    Sparse,
    Structured,
    Subject,
)
from nybble.prune.graph import UnitGraph, transformer
from nybble.prune.passes import Changes, compensate, sparsify
from nybble.prune.plan import Cut, Plan, structure
from nybble.runtime.files import read_json

__all__ = ["PLAN", "PrunedModel"]

PLAN = ("plan.json", "plan.safetensors")
"""Files of a folder that say which units stayed."""

_REPORT = "prune.json"
_MAX_JSON = 64 << 20
_ROWS_AT_ONCE = 64 << 20  # bytes of float32

Floats = npt.NDArray[np.float32]


class PrunedModel:
    """A model that is pruned on the way to a folder.

    Parameters
    ----------
    source
        The model.
    method
        How.
    shown
        The text, or for an encoder the images, that it is shown; ``None`` for methods that look at
        weights alone.
    out
        The final folder; the pruned model is kept beside it.
    threads
        Threads to use.
    recovery, recovery_text
        What is trained afterwards, and on what; ``None`` for nothing.
    """

    def __init__(
        self,
        source: Source,
        method: PruneMethod,
        shown: CalibrationSet | ImageSet | None,
        out: Path,
        threads: int | None = None,
        recovery: Recovery | None = None,
        recovery_text: CalibrationSet | None = None,
    ) -> None:
        if structure_of(source.config) is not None:
            message = f"{source.path}: a pruned model is not pruned again: prune the original"
            raise UnsupportedError(message)
        self.source = source
        self.method = method
        self.shown = shown
        self.threads = threads
        self.recovery = recovery
        self.recovery_text = recovery_text
        parts = source.plan()
        self.encoder = parts["kind"] == "encoder"
        kinds = method.kinds if isinstance(method, Structured) else ()
        self.name = next(name for name, kind in METHODS.items() if kind is type(method))
        if self.encoder and method.gradients:
            message = (
                f"{self.name} is not supported for image encoders: it looks at the gradient of "
            )
            message += "a loss on text"
            raise UnsupportedError(message)
        shapes = {name: tuple(shape) for name, (_, shape) in source.tensors.items()}
        self.subject = Subject(source.config, parts, shapes, source.tensor, threads)
        self.graph = transformer(parts, shapes, kinds)
        self.folder = out.absolute().parent / f".{out.name}.pruned-{self._key()}"
        self.report: dict[str, Any] = {}

    def _key(self) -> str:
        """Name what the result depends on; of the weights, sizes and times stand for contents."""
        weights = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns)
            for file in files.weight_files(self.source.path)
        ]
        shown = None if self.shown is None else self.shown.digest
        facts = [_nybble.version(), weights, self.name, repr(self.method), shown]
        if self.recovery_text is not None:
            facts += [repr(self.recovery), self.recovery_text.digest]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def make(self, *, progress: bool = True) -> Source:
        """Prune, or find what an earlier run has made; return the pruned model.

        Raises
        ------
        ArgumentError
            When the budget would empty a layer.
        FormatError
            When weights or activations are not finite.
        """
        if not (self.folder / "config.json").exists():
            with _nybble.StagedFolder(str(self.folder), True) as staged:
                self._write(Path(staged.path), progress=progress)
                staged.commit()
        self.report = read_json(self.folder / _REPORT, _MAX_JSON)
        return Source(self.folder)

    def keep_plan(self, folder: Path) -> None:
        """Copy the plan, if units were cut, beside the final weights."""
        for name in PLAN:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)

    def remove(self) -> None:
        """Remove the folder, and those of other settings that were meant for the same output."""
        name, _, _ = self.folder.name.rpartition("-")
        for folder in self.folder.parent.glob(f"{name}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, folder: Path, *, progress: bool) -> None:
        windows = None if self.shown is None else self.shown.windows
        changes = Changes()
        with tqdm(
            total=len(self.graph.layers),
            desc="prune",
            unit="layer",
            disable=not progress,
            dynamic_ncols=True,
        ) as bar:
            if isinstance(self.method, Structured):
                plan, changed, biases = self._structured(self.method, windows, changes, bar.update)
            else:
                assert isinstance(self.method, Sparse)
                plan, changed, biases = self._sparse(self.method, windows, changes, bar.update)
            cut = Cut(self.graph, plan)
            names = _renamed(self.graph, plan)
            stays = [name for name in self.graph.shapes if not cut.gone(name)]
            entries = [(names(name), "F32", cut.shape(name)) for name in stays]
            entries += [(names(name), "F32", (rows,)) for name, rows in biases.items()]
            writer = _nybble.SafeTensorsWriter(str(folder / "model.safetensors"), entries)
            done = set()
            for name, values in changed:
                writer.write(names(name), np.ascontiguousarray(values, dtype="<f4").data)
                done.add(name)
            for name in stays:
                if name not in done:
                    values = cut.cut(name, self.subject.weight(name))
                    writer.write(names(name), np.ascontiguousarray(values, dtype="<f4").data)
            writer.finish()
            bar.update(bar.total - bar.n)
        layers = structure(self.graph, plan, changes.biases)
        config = self._config(layers, cut)
        if plan.keep:
            plan.save(folder)
        report = self._report(plan, layers, changes)
        files.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        if self.recovery is not None and self.recovery_text is not None:
            left = tuple(_left(self.graph, plan))
            patient = Patient(
                subject(folder, self.threads),
                self.subject,
                left,
                plan.keep.get("hidden"),
                changes.masks,
            )
            report["recovery"] = recover(
                folder, patient, self.recovery, self.recovery_text, self.threads, progress=progress
            )
        files.write_text(folder / _REPORT, json.dumps(report, indent=1) + "\n")

    def _structured(
        self,
        method: Structured,
        windows: npt.NDArray[Any] | None,
        changes: Changes,
        advance: Any,
    ) -> tuple[Plan, Iterator[tuple[str, Floats]], dict[str, int]]:
        lens = Lens(self.subject, self.graph, windows)
        keep = method.keep(self.graph, lens)
        lens.release()
        plan = Plan(self.graph.digest, keep, provenance=self._provenance())
        self._expressible(plan)
        biases: dict[str, int] = {}
        if not method.compensator.needs or windows is None:
            return plan, iter(()), biases
        if method.compensator.adds_bias:
            axes = self.graph.kept_axes(keep)
            for layer in self.graph.layers:
                for linear in (layer.out, layer.down):
                    name = f"{linear}.bias"
                    touched = not all(a.all() for a in axes.get(f"{linear}.weight", {}).values())
                    if touched and name not in self.graph.shapes:
                        biases[name] = self.graph.shapes[f"{linear}.weight"][0]
        pass_ = compensate(self.subject, windows, self.graph, plan, method, changes, advance)
        return plan, pass_, biases

    def _sparse(
        self, method: Sparse, windows: npt.NDArray[Any] | None, changes: Changes, advance: Any
    ) -> tuple[Plan, Iterator[tuple[str, Floats]], dict[str, int]]:
        fisher: Mapping[str, Floats] = {}
        if method.gradients:
            lens = Lens(self.subject, self.graph, windows)
            fisher = lens.evidence({"fisher"}).fisher
            lens.release()
        plan = Plan(self.graph.digest, provenance=self._provenance())
        pass_ = sparsify(self.subject, windows, self.graph, method, fisher, changes, advance)
        return plan, pass_, {}

    def _provenance(self) -> dict[str, Any]:
        shown = None if self.shown is None else self.shown.to_json()
        settings = dataclasses.asdict(self.method)  # type: ignore[call-overload]
        return {"method": self.name, "settings": settings, "calibration": shown}

    def _expressible(self, plan: Plan) -> None:
        """Refuse shapes that the family's configuration cannot say."""
        kind = self.source.config.get("model_type")
        layers = structure(self.graph, plan)
        before = structure(self.graph, Plan(self.graph.digest))
        if not layers:
            message = "ratio: expected layers to be left, found none"
            raise ConfigError(message)
        if self.encoder or kind in FAMILIES or layers == before:
            return
        same = all(dict(layer) == dict(layers[0]) for layer in layers)
        heads = [
            {key: layer[key] for key in KEYS if key != "intermediate_size"}
            for layer in (layers[0], before[0])
        ]
        if not (same and heads[0] == heads[1] and kind in _INNER):
            message = f"{kind}: its configuration gives all layers one shape: heads cannot go, and "
            message += f"as many neurons must in each (layers may differ in {', '.join(FAMILIES)})"
            raise UnsupportedError(message)

    def _config(self, layers: list[dict[str, Any]], cut: Cut) -> dict[str, Any]:
        source = self.source.config
        config = {k: v for k, v in source.items() if k not in ("nybble", "torch_dtype")}
        config["dtype"] = "float32"
        kind = config.get("model_type")
        before = structure(self.graph, Plan(self.graph.digest))
        left = _left(self.graph, cut.plan)
        if self.encoder:
            return _encoder_config(config, layers, [before[index] for index in left])
        if len(layers) != len(before):
            self._drop_layers(config, left)
        if kind in FAMILIES:
            for key in KEYS:
                config[key] = max(layer[key] for layer in layers)
            config["head_dim"] = self.graph.layers[0].head_dim
            # Where layers differ this shape is no layer's: readers want heads divided evenly in it.
            share = -(-config["num_attention_heads"] // max(config["num_key_value_heads"], 1))
            config["num_attention_heads"] = share * config["num_key_value_heads"]
        elif layers[0]["intermediate_size"] != before[0]["intermediate_size"]:
            config[_INNER[str(kind)]] = layers[0]["intermediate_size"]
        if cut.widening != 1:
            config["hidden_size"] = round(config["hidden_size"] / cut.widening)
            config["rms_norm_eps"] = config.get("rms_norm_eps", 1e-6) * cut.widening
        if not plain(layers):
            config["nybble"] = {"version": 1, "structure": {"layers": layers}}
        return config

    def _drop_layers(self, config: dict[str, Any], left: list[int]) -> None:
        depth = len(self.graph.layers)
        key = "n_layer" if "n_layer" in config else "num_hidden_layers"
        config[key] = len(left)
        types = config.get("layer_types")
        if isinstance(types, list) and len(types) == depth:
            config["layer_types"] = [types[index] for index in left]
        elif config.get("sliding_window") or config.get("scale_attn_by_inverse_layer_idx"):
            message = "layers cannot go: what one does depends on its number, and config.json has "
            message += "no layer_types"
            raise UnsupportedError(message)
        config.pop("max_window_layers", None)
        config.pop("sliding_window_pattern", None)

    def _report(self, plan: Plan, layers: list[dict[str, Any]], changes: Changes) -> dict[str, Any]:
        graph = self.graph
        prefixes = tuple(f"{layer.prefix}." for layer in graph.layers)
        inside = [name for name in graph.shapes if name.startswith(prefixes)]
        total, in_layers = graph.parameters(), graph.parameters(inside)
        zeros = sum(int(mask.size - mask.sum()) for mask in changes.masks.values())
        gone = total - graph.parameters_left(plan.keep) + zeros
        left = _left(graph, plan)
        rows = []
        shapes = dict(zip(left, layers, strict=True))
        for index, layer in enumerate(graph.layers):
            errors = {
                linear.removeprefix(f"{layer.prefix}."): error
                for linear, error in changes.errors.items()
                if linear.startswith(f"{layer.prefix}.")
            }
            row: dict[str, Any] = {"layer": index, "dropped": index not in shapes, "error": errors}
            row.update(shapes.get(index, {}))
            rows.append(row)
        return {
            **self._provenance(),
            "achieved": {
                "parameters": gone,
                "share_of_layers": gone / max(in_layers, 1),
                "share_of_model": gone / max(total, 1),
                "zeros": zeros,
            },
            "layers": rows,
        }


_INNER = {"opt": "ffn_dim", "gpt2": "n_inner"}
_OF_LAYERS = ("stage_names", "out_features", "out_indices")
"""Lists of an encoder's layers, which transformers makes anew."""


def _encoder_config(
    config: dict[str, Any], layers: list[dict[str, Any]], before: list[dict[str, Any]]
) -> dict[str, Any]:
    """Say the layers' shapes in an encoder's configuration; its head's width is that of all heads.

    What the family's own keys say of a layer stays as it was, unless they can say all: as many
    neurons less in every layer, where their number is a key.
    """
    sizes = config.get("vision_config")
    if isinstance(sizes, Mapping):
        sizes = config["vision_config"] = dict(sizes)
    else:
        sizes = config
    if len(layers) != sizes.get("num_hidden_layers"):
        sizes["num_hidden_layers"] = len(layers)
        for key in _OF_LAYERS:
            sizes.pop(key, None)
    inner = layers[0]["intermediate_size"]
    narrower = [{**layer, "intermediate_size": inner} for layer in before]
    # SigLIP's attention behind the layers has a feed-forward block of that size, too.
    known = sizes.get("intermediate_size") == before[0]["intermediate_size"]
    known = known and not str(config.get("model_type")).startswith("siglip")
    if layers == narrower and known:
        sizes["intermediate_size"] = inner
    elif layers != before:
        config["nybble"] = {"version": 1, "structure": {"layers": layers}}
    return config


def _left(graph: UnitGraph, plan: Plan) -> list[int]:
    return [
        index
        for index in range(len(graph.layers))
        if len(plan.keep.get(f"layers.{index}.layer", [0]))
    ]


def _renamed(graph: UnitGraph, plan: Plan) -> Any:
    """Return a function that gives tensors the numbers of the layers that are left."""
    places = {f"{graph.layers[old].prefix}.": new for new, old in enumerate(_left(graph, plan))}

    def rename(name: str) -> str:
        for prefix, new in places.items():
            if name.startswith(prefix):
                stem = prefix.rstrip(".").rpartition(".")[0]
                return f"{stem}.{new}.{name.removeprefix(prefix)}"
        return name

    return rename
