"""A transformers model walked through with one layer in memory.

The model's code is transformers' own; its weights are nybble's reader's, so that every format and
family that can be compressed can be calibrated. Weights live on torch's ``meta`` device, which has
shapes and no memory, until their layer's turn.

First :meth:`Walk.embed` runs what stands before the layers, and notes with which further arguments
(masks, positions) the model calls each layer. Then each layer is run alone
(:class:`~nybble.calibrate.layer.Layer`). What is between the layers, the hidden states of all
windows, is the caller's. To an image encoder a window is an image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.calibrate import encoders
from nybble.calibrate.layer import Layer, put
from nybble.errors import ConfigError, UnsupportedError
from nybble.formats.ragged import reshape, structure_of

if TYPE_CHECKING:
    import torch

__all__ = ["Walk"]

Floats = npt.NDArray[np.float32]
Reader = Callable[[str, int, int | None], Floats]
"""Rows of a tensor by name, first row and end."""


class _Done(Exception):
    """The last layer was reached."""


def _torch() -> Any:
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        message = f"calibration needs {error.name}: pip install 'nybble[compress]'"
        raise UnsupportedError(message) from None
    return torch


@contextmanager
def _weights_on_meta(torch: Any) -> Iterator[None]:
    """Make modules without memory for parameters; buffers, which no file holds, are computed."""
    module, original = torch.nn.Module, torch.nn.Module.register_parameter

    def register(self: Any, name: str, parameter: Any) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(self, name, parameter)

    module.register_parameter = register
    try:
        yield
    finally:
        module.register_parameter = original


class Walk:
    """The model.

    Parameters
    ----------
    config
        Its configuration, as of ``config.json``.
    plan
        What its parts are (:meth:`nybble._nybble.Checkpoint.plan`).
    shapes
        Shapes of its tensors by name.
    read
        Reads a tensor's rows as float32.
    threads
        Threads torch may use; ``None`` leaves its own choice.
    """

    def __init__(
        self,
        config: dict[str, Any],
        plan: dict[str, Any],
        shapes: dict[str, Sequence[int]],
        read: Reader,
        threads: int | None = None,
    ) -> None:
        self.torch = _torch()
        if threads is not None:
            self.torch.set_num_threads(threads)
        from transformers import AutoConfig, AutoModelForCausalLM

        self.images = plan.get("kind") == "encoder"
        left_out = ("dtype", "torch_dtype", "nybble")
        settings = {k: v for k, v in config.items() if k not in left_out}
        with _weights_on_meta(self.torch):
            if self.images:
                self._model = encoders.tower(config)
            else:
                known = AutoConfig.for_model(**settings)
                self._model = AutoModelForCausalLM.from_config(known).eval()
            if (layers := structure_of(config)) is not None:
                reshape(self._model, layers)
        self.plan = plan
        self._read = read
        self._shapes = shapes
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._adds: dict[type, bool] = {}
        self.prefixes = _prefixes(plan["layers"])
        # Where an encoder has what its file names otherwise; a decoder's names are its paths.
        self._paths = encoders.paths(self._model, shapes) if self.images else {}
        self._names = {path: name for name, path in self._paths.items()}
        self._places = [self._place(prefix) for prefix in self.prefixes]
        if config.get("model_type") == encoders.POST_NORM:
            self._put_norms_behind(config)

    def _place(self, prefix: str) -> str:
        """Return the path of a layer that the file calls `prefix`."""
        mine = (path for name, path in self._paths.items() if name.startswith(f"{prefix}."))
        path = next(mine, None)
        if path is not None:
            return _prefix(path)
        if self.images:
            message = f"{prefix}: this version of transformers has no such layer"
            raise UnsupportedError(message)
        return prefix

    def _put_norms_behind(self, config: dict[str, Any]) -> None:
        for place, parts in zip(self._places, self.plan["layers"], strict=True):
            ends = [self._paths[f"{parts['mlp'][end]}.weight"] for end in ("up", "down")]
            up, down = (self._model.get_submodule(e.removesuffix(".weight")) for e in ends)
            layer = self._model.get_submodule(place)
            encoders.norms_behind(layer, up, down, config.get("hidden_act", "gelu"))

    def __len__(self) -> int:
        return len(self.prefixes)

    def fill(
        self,
        module: Any,
        prefix: str,
        rows: npt.NDArray[np.int64] | None = None,
        *,
        optional: bool = False,
    ) -> None:
        """Give a module's parameters their weights; of its first, perhaps only some rows.

        What is `optional` may be missing in the file.
        """
        for name, parameter in list(module.named_parameters()):
            full = f"{prefix}.{name}" if prefix else name
            full = self._names.get(full, full)
            if full not in self._shapes:
                if optional:
                    continue
                message = f"{full}: expected a tensor of this name, found none"
                raise ConfigError(message)
            if rows is None:
                values = self._read(full, 0, None).reshape(parameter.shape)
                value = self.torch.from_numpy(values)
            else:
                # Memory that is never touched is never taken: a table costs what is used of it.
                value = self.torch.empty(parameter.shape)
                for row in rows:
                    value[row] = self.torch.from_numpy(self._read(full, int(row), int(row) + 1)[0])
            put(module, name, self.torch.nn.Parameter(value, requires_grad=False))

    def whole(self) -> Any:
        """Return transformers' model with all its weights, for what needs all layers at once."""
        skipped = ("lm_head",) if self.plan["tied"] else ()
        for name, module in list(self._model.named_modules()):
            if name not in skipped and list(module.parameters(recurse=False)):
                self.fill(module, name)
        if skipped:
            table = self._model.get_submodule(self.plan["embeddings"][0]["module"])
            put(self._model, "lm_head.weight", table.weight)
        return self._model

    def embed(self, windows: npt.NDArray[Any]) -> list[torch.Tensor]:
        """Return what enters the first layer: ``[1, tokens, hidden]`` for each window.

        Parameters
        ----------
        windows
            Token ids ``[windows, context]``; for an image encoder prepared images
            ``[images, channels, height, width]`` in float32.
        """
        torch, model = self.torch, self._model
        layers = self._places[0].rpartition(".")[0]
        tables = [table["module"] for table in self.plan["embeddings"][:1]]
        for table in tables:
            self.fill(model.get_submodule(table), table, np.unique(windows))
        for name, module in list(model.named_modules()):
            outside = not name.startswith((f"{layers}.", "lm_head")) and name not in tables
            if outside and list(module.parameters(recurse=False)):
                # Encoders have parts that encoding does without, as a token that hides patches.
                self.fill(module, name, optional=self.images)
        stack = model.get_submodule(layers)
        originals = list(stack)
        hidden: list[Any] = []
        try:
            with torch.inference_mode():
                # Layers return tensors, or tuples that begin with one, as their family and the
                # version of transformers have it.
                for form in (lambda h: h, lambda h: (h,)):
                    recorders = [_recorder(torch, layer, form) for layer in originals]
                    recorders[-1].last = True
                    for index, recorder in enumerate(recorders):
                        stack[index] = recorder
                    hidden = self._record(windows, recorders)
                    if hidden:
                        break
        finally:
            for index, layer in enumerate(originals):
                stack[index] = layer
        if not hidden:
            message = f"{self.plan['family']}: this version of transformers calls layers otherwise"
            raise UnsupportedError(message)
        for table in tables:
            model.get_submodule(table).to("meta")
        return hidden

    def _record(self, windows: npt.NDArray[Any], recorders: list[Any]) -> list[torch.Tensor]:
        hidden = []
        for window in windows:
            values = self.torch.from_numpy(window[None])
            try:
                if self.images:
                    encoders.run(self._model, values)
                else:
                    self._model(values, use_cache=False)
            except _Done:
                pass
            except (TypeError, IndexError, AttributeError, ValueError):
                return []
            first = recorders[0].hidden
            if any(r.hidden is None or r.hidden.shape != first.shape for r in recorders):
                return []
            hidden.append(first.clone())
        self._calls = [(recorder.args, recorder.kwargs) for recorder in recorders]
        return hidden

    def layer(self, index: int) -> Layer:
        """Return a layer with its weights; it is the caller's to drop before the next one."""
        prefix, place = self.prefixes[index], self._places[index]
        module = self._model.get_submodule(place)
        self.fill(module, place)
        paths = {
            name.rpartition(".")[0]: path.rpartition(".")[0].removeprefix(f"{place}.")
            for name, path in self._paths.items()
            if path.startswith(f"{place}.")
        }
        parts, call = self.plan["layers"][index], self._calls[index]
        return Layer(self.torch, module, prefix, parts, call, paths, self._adds)

    def drop(self, index: int) -> None:
        """Give a layer's memory back."""
        self._model.get_submodule(self._places[index]).to("meta")


def _prefixes(layers: Sequence[dict[str, Any]]) -> list[str]:
    """Return the layers' paths; one that has no linear is named after the others."""
    ends = [
        (layer["attention"] or {}).get("out") or (layer["mlp"] or {}).get("down")
        for layer in layers
    ]
    known = next((end for end in ends if end), None)
    if known is None:
        message = "expected a layer with attention or a feed-forward block, found none"
        raise ConfigError(message)
    stem = _prefix(known).rpartition(".")[0]
    return [f"{stem}.{index}" for index in range(len(layers))]


def _prefix(module: str) -> str:
    found = re.match(r".*?\.\d+(?=\.)", module)
    if found is None:
        message = f"{module}: expected the name of a layer's part"
        raise ConfigError(message)
    return found[0]


def _recorder(torch: Any, layer: Any, form: Callable[[Any], Any]) -> Any:
    class Recorder(torch.nn.Module):  # type: ignore[misc]
        """Stands in for a layer and notes how it is called."""

        hidden = None
        last = False
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}  # noqa: RUF012
        attention_type = getattr(layer, "attention_type", None)

        def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
            self.hidden, self.args, self.kwargs = hidden, args, kwargs
            if self.last:
                raise _Done
            return form(hidden)

    return Recorder()
