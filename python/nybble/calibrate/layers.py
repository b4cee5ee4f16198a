"""A transformers model walked through with one layer in memory.

The model's code is transformers' own; its weights are nybble's reader's, so that every format and
family that can be compressed can be calibrated. Weights live on torch's ``meta`` device, which has
shapes and no memory, until their layer's turn.

First :meth:`Walk.embed` runs what stands before the layers, and notes with which further arguments
(masks, positions) the model calls each layer. Then each :class:`Layer` is run alone. What is
between the layers, the hidden states of all windows, is the caller's. To an image encoder a window
is an image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.calibrate import encoders
from nybble.errors import ConfigError, UnsupportedError
from nybble.formats.ragged import reshape, structure_of

if TYPE_CHECKING:
    import torch

__all__ = ["Layer", "Walk"]

Floats = npt.NDArray[np.float32]
Reader = Callable[[str, int, int | None], Floats]
"""Rows of a tensor by name, first row and end."""


class _Caught(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


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
            _put(module, name, self.torch.nn.Parameter(value, requires_grad=False))

    def whole(self) -> Any:
        """Return transformers' model with all its weights, for what needs all layers at once."""
        skipped = ("lm_head",) if self.plan["tied"] else ()
        for name, module in list(self._model.named_modules()):
            if name not in skipped and list(module.parameters(recurse=False)):
                self.fill(module, name)
        if skipped:
            table = self._model.get_submodule(self.plan["embeddings"][0]["module"])
            _put(self._model, "lm_head.weight", table.weight)
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


def _put(module: Any, name: str, parameter: Any) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = parameter


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


class Layer:
    """One layer with its weights, which may be changed in place.

    Parameters
    ----------
    torch
        The library.
    module
        transformers' layer.
    prefix
        Its path in the model, as files name it.
    parts
        Its entry in the plan's ``layers``.
    call
        With what, besides the hidden states, it is called.
    paths
        Where in it modules are that the plan names otherwise.
    adds
        By class of attention, as far as it is known: whether its output is what it gives without
        its last linear's, plus that linear's, to the last bit. Shared by a model's layers, of which
        the first that runs finds it out.
    """

    def __init__(
        self,
        torch: Any,
        module: Any,
        prefix: str,
        parts: dict[str, Any],
        call: Any,
        paths: Mapping[str, str],
        adds: dict[type, bool],
    ) -> None:
        self._torch = torch
        self._module = module
        self.prefix = prefix
        self.parts = parts
        self._paths = paths
        self._args, self._kwargs = call
        self._adds = adds
        self._recordable: Any = None
        attention, mlp = parts["attention"] or {}, parts["mlp"] or {}
        stages = (
            attention.get("qkv", ()),
            (attention.get("out"),),
            (mlp.get("gate"), mlp.get("up")),
            (mlp.get("down"),),
        )
        self.stages: list[list[str]] = [[name for name in stage if name] for stage in stages]
        """The linears in the order of the forward pass; together, those that read the same. A
        stage of a block that the layer does not have is empty."""
        self._window = 0
        self._attended: dict[int, Any] | None = None
        # The inputs of attention's last linear, with what its module returned when that gave
        # nothing; and those of the feed-forward's last.
        self._mixed: dict[int, tuple[Any, Any]] = {}
        self._kept: dict[int, Any] = {}
        # What norms and the like gave, by window and path, while stages are gone through.
        self._given: dict[int, dict[str, Any]] = {}
        # Modules that do something else meanwhile, with what their instance had as `forward`.
        self._replaced: dict[Any, Any] = {}

    def _place(self, name: str) -> str:
        return self._paths.get(name) or name.removeprefix(f"{self.prefix}.")

    def _part(self, name: str) -> Any:
        return self._module.get_submodule(self._place(name))

    def tensor(self, name: str) -> Floats | None:
        """Return a parameter as it is stored, as an array that shares its memory."""
        path, _, leaf = name.rpartition(".")
        parameter = self._part(path)._parameters.get(leaf)
        return None if parameter is None else parameter.data.numpy()

    def weight(self, linear: str) -> Floats:
        """Return a linear's weight ``[rows, cols]``; what is written into it changes the layer."""
        values = self.tensor(f"{linear}.weight")
        assert values is not None
        # GPT-2's linears keep inputs as rows.
        return values.T if type(self._part(linear)).__name__ == "Conv1D" else values

    def set_bias(self, linear: str, values: Floats) -> None:
        """Give a linear a bias, whether or not it has one."""
        parameter = self._torch.nn.Parameter(self._torch.from_numpy(values), requires_grad=False)
        _put(self._part(linear), "bias", parameter)

    def trace(self, hidden: list[torch.Tensor]) -> Iterator[tuple[int, list[Floats], torch.Tensor]]:
        """Run all windows; give each one's number, the inputs of each stage, and the output.

        Not between :meth:`inputs` and :meth:`outputs`, which skip what is known.
        """
        caught: dict[int, Floats] = {}

        def keep(stage: int) -> Callable[[Any, Any], None]:
            return lambda _, args: caught.__setitem__(stage, _rows(args[0]))

        hooks = [
            self._part(linears[0]).register_forward_pre_hook(keep(stage))
            for stage, linears in enumerate(self.stages)
            if linears
        ]
        nothing = np.zeros((0, 0), dtype=np.float32)
        try:
            for index, states in enumerate(hidden):
                output = self._forward(index, states)
                yield index, [caught.get(i, nothing) for i in range(len(self.stages))], output
        finally:
            for hook in hooks:
                hook.remove()

    def inputs(self, stage: int, hidden: list[torch.Tensor]) -> Iterator[tuple[int, Floats]]:
        """Run all windows up to a stage; give each one's number and the stage's inputs.

        Stages come in order, and what an earlier one computed is not computed again. Once the third
        was asked for, attention counts as finished and is computed once a window; the inputs of the
        last are kept for :meth:`outputs`.
        """

        def catch(_: Any, args: Any) -> None:
            raise _Caught(args[0])

        if not self.stages[stage]:
            return
        self._remember()
        if stage == 1:
            yield from self._mixing(hidden)
            return
        if stage >= 2 and self._attended is None and self.stages[1]:
            self._finish_attention()
        hooks = [self._part(name).register_forward_pre_hook(catch) for name in self.stages[stage]]
        try:
            for index, states in enumerate(hidden):
                value = self._until_caught(index, states)
                if stage == 3:
                    self._kept[index] = value
                yield index, _rows(value)
        finally:
            for hook in hooks:
                hook.remove()

    def _until_caught(self, index: int, states: torch.Tensor) -> Any:
        try:
            self._forward(index, states)
        except _Caught as caught:
            return caught.value
        message = f"{self.prefix}: this version of transformers does not run all of its linears"
        raise UnsupportedError(message)

    def _replace(self, module: Any, forward: Callable[..., Any]) -> None:
        self._replaced.setdefault(module, module.__dict__.get("forward"))
        module.forward = forward

    def _remember(self) -> None:
        """Let what is no linear and no part of attention compute once a window.

        What runs before a stage's linears depends on earlier ones alone, which change no more. An
        eighth of Wanda's time was norms, computed again on the way to each stage.
        """
        if self._replaced:
            return
        linears = {self._place(name) for stage in self.stages for name in stage}
        inside = self._place(self.stages[1][0]).rpartition(".")[0] if self.stages[1] else None

        def once(path: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = self._given.setdefault(self._window, {})
                if path not in given:
                    given[path] = original(*args, **kwargs)
                return given[path]

            return forward

        for path, module in self._module.named_modules():
            alone = next(module.children(), None) is None and any(True for _ in module.parameters())
            attends = inside is not None and path.startswith(f"{inside}.")
            if alone and not attends and path not in linears:
                self._replace(module, once(path, module.forward))

    def forget(self) -> None:
        """Forget what stages have computed: it is used up, or weights they went through change."""
        for module, forward in self._replaced.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        for memory in (self._replaced, self._given, self._mixed, self._kept):
            memory.clear()
        self._attended = None

    def outputs(self, hidden: list[torch.Tensor]) -> None:
        """Replace the hidden states with what the layer makes of them."""
        if self._kept:
            down = self._part(self.stages[3][0])
            original = down.forward
            self._replace(down, lambda _: original(self._kept.pop(self._window)))
            for name in self.stages[2]:  # what they would give is not looked at
                self._replace(self._part(name), _nothing(self.weight(name).shape[0], tokens=1))
        for index, states in enumerate(hidden):
            hidden[index] = self._forward(index, states)
            self._given.pop(index, None)
            if self._attended:
                self._attended.pop(index, None)
        self.forget()

    @property
    def _attention(self) -> Any:
        out = self._place(self.parts["attention"]["out"])
        return self._module.get_submodule(out.rpartition(".")[0])

    def _mixing(self, hidden: list[torch.Tensor]) -> Iterator[tuple[int, Floats]]:
        """Run all windows up to the end of attention, with nothing for its last linear's outputs.

        A module adds those to others, if it does anything with them: then they can be added to what
        it returns.
        """
        inputs = None

        def catch(_: Any, args: Any, output: Any) -> None:
            raise _Caught((inputs, output))

        def keep(x: Any) -> Any:
            nonlocal inputs
            inputs = x
            return nothing(x)

        out = self._part(self.stages[1][0])
        nothing = _nothing(self.weight(self.stages[1][0]).shape[0])
        hook = self._attention.register_forward_hook(catch)
        out.forward = keep
        try:
            for index, states in enumerate(hidden):
                self._mixed[index] = self._until_caught(index, states)
                yield index, _rows(self._mixed[index][0])
        finally:
            del out.forward
            hook.remove()

    def _finish_attention(self) -> None:
        attention, out = self._attention, self._part(self.stages[1][0])
        original = attention.forward
        memory: dict[int, Any] = {}
        self._attended = memory
        kind = type(attention)

        def forward(*args: Any, **kwargs: Any) -> Any:
            window = self._window
            if window not in memory:
                inputs, output = self._mixed.pop(window, (None, None))
                if inputs is None or not self._adds.get(kind, True):
                    memory[window] = original(*args, **kwargs)
                elif isinstance(output, tuple):
                    memory[window] = (output[0] + out(inputs), *output[1:])
                else:
                    memory[window] = output + out(inputs)
                if inputs is not None and kind not in self._adds:
                    whole = original(*args, **kwargs)
                    first, second = (_first(value) for value in (whole, memory[window]))
                    self._adds[kind] = self._torch.equal(first, second)
                    memory[window] = whole
            return memory[window]

        self._replace(attention, forward)

    @property
    def parameters(self) -> dict[str, Any]:
        """Its parameters, by name."""
        names = {path: name for name, path in self._paths.items()}
        found = {}
        for path, parameter in self._module.named_parameters():
            module, _, leaf = path.rpartition(".")
            name = f"{names[module]}.{leaf}" if module in names else f"{self.prefix}.{path}"
            found[name] = parameter
        return found

    def run(self, states: torch.Tensor) -> torch.Tensor:
        """Return what it makes of states ``[1, context, hidden]``, with gradients if on."""
        if self._recordable is None:
            tensors = self._torch.utils._pytree.tree_map(
                lambda x: x.clone() if isinstance(x, self._torch.Tensor) else x,
                (self._args, self._kwargs),
            )
            self._recordable = tensors  # no longer tensors of inference, which cannot be recorded
        args, kwargs = self._recordable
        return _first(self._module(states, *args, **kwargs))

    def _forward(self, index: int, states: torch.Tensor) -> torch.Tensor:
        self._window = index
        with self._torch.inference_mode():
            output = self._module(states, *self._args, **self._kwargs)
        return _first(output)


def _first(output: Any) -> torch.Tensor:
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _nothing(rows: int, tokens: int | None = None) -> Callable[[Any], Any]:
    """Return what gives zeros in the place of a linear's outputs, of all tokens or of some."""

    def forward(x: Any) -> Any:
        shape = x.shape[:-1] if tokens is None else (1,) * (x.ndim - 2) + (tokens,)
        return x.new_zeros(()).expand(*shape, rows)

    return forward


def _rows(inputs: torch.Tensor) -> Floats:
    values: Floats = inputs.reshape(-1, inputs.shape[-1]).numpy()
    return values
