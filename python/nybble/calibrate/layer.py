"""One layer of a transformers model, run stage by stage while its weights change.

What a stage's linears read is asked for (:meth:`Layer.inputs`), their weights are changed, and the
next stage sees that. What earlier stages have computed is kept for the later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

__all__ = ["Layer", "put"]

Floats = npt.NDArray[np.float32]


class _Caught(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


def put(module: Any, name: str, parameter: Any) -> None:
    """Put a parameter into a module, by the path below it."""
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = parameter


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
        put(self._part(linear), "bias", parameter)

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
