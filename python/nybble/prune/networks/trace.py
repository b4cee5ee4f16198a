"""Units of a torch module, found by following channels through it once.

The module is traced by ``torch.fx`` and run on example inputs. Submodules whose code cannot be
traced, because it depends on the data, stay whole; so do channels that something without a rule
(:mod:`nybble.prune.networks.operators`) reads, and those of the network's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from nybble.errors import UnsupportedError
from nybble.prune.graph import CHANNEL, Builder, Slice, UnitGraph
from nybble.prune.networks.channels import Axes, Channels, Ids, Seen
from nybble.prune.networks.operators import MODULES, NAMES, Call, numbers

__all__ = ["evaluated", "trace"]

_ON_LISTS = ("cat", "concat", "concatenate")  # what takes tensors in a list
_EITHER = ("add", "sub", "mul", "truediv", "pow", "div")  # whose first argument may be a number


def trace(module: torch.nn.Module, *inputs: Any) -> UnitGraph:
    """Find the channels of a network that can be removed.

    Parameters
    ----------
    module
        The network, with float32 parameters on the CPU.
    *inputs
        An example of what it is called with; their shapes are what matters.

    Returns
    -------
    UnitGraph
        Groups of the kind :data:`nybble.prune.graph.CHANNEL`, named by the modules that give them,
        whose units are equal in cost. What stays whole is in ``whole``, with the reasons.

    Raises
    ------
    UnsupportedError
        When the network's own code cannot be traced, or a parameter is of another type.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            message = f"{name}: expected float32 on the CPU, "
            message += f"found {parameter.dtype} on {parameter.device}"
            raise UnsupportedError(message)
    with evaluated(module), torch.no_grad():
        graph, whole = _graph(module)
        walk = _Walk(module, graph)
        walk.run(*inputs)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    statistics = frozenset(name for name, _ in module.named_buffers())
    groups, held = _groups(walk, shapes)
    return UnitGraph(groups, shapes, statistics=statistics, whole={**held, **whole})


@contextmanager
def evaluated(module: torch.nn.Module) -> Iterator[None]:
    """Put a module's parts into evaluation mode, and back."""
    were = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in were:
            part.training = training


class _Tracer(fx.Tracer):  # type: ignore[misc]
    """A tracer that notes where it failed, and does not look into some modules."""

    def __init__(self, whole: Mapping[str, str]) -> None:
        super().__init__()
        self.whole = whole
        self.failed: str | None = None

    def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
        return module_qualified_name in self.whole or super().is_leaf_module(
            m, module_qualified_name
        )

    def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def _graph(module: torch.nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace; return what could not be, too, with the reasons."""
    whole: dict[str, str] = {}
    while True:
        tracer = _Tracer(whole)
        try:
            return fx.GraphModule(module, tracer.trace(module)), whole
        except Exception as error:
            told = str(error).strip("'") or repr(error)
            reason = f"cannot be traced: {told.splitlines()[0]}"
            if tracer.failed is None:
                message = f"{type(module).__name__}: {reason}"
                raise UnsupportedError(message) from error
            whole[tracer.failed] = reason


class _Walk(fx.Interpreter):  # type: ignore[misc]
    """Runs the network on an example and follows the channels."""

    def __init__(self, module: torch.nn.Module, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.channels = Channels()
        self.places: dict[tuple[str, int], tuple[str, Ids]] = {}
        self._names = {
            id(tensor): name
            for named in (module.named_buffers(), module.named_parameters())
            for name, tensor in named
        }
        self._parameters = {id(parameter) for parameter in module.parameters()}
        self._seen: dict[Any, Seen] = {}

    def axis(self, tensor: Any, axis: int, role: str) -> Ids:
        """See :meth:`nybble.prune.networks.operators.Tensors.axis`."""
        place = (self._names[id(tensor)], axis)
        if place not in self.places:
            self.places[place] = (role, self.channels.new(tensor.shape[axis]))
        return self.places[place][1]

    def run_node(self, n: Any) -> Any:
        value = super().run_node(n)
        self._seen[n] = self._follow(n, value)
        return value

    def _follow(self, node: Any, value: Any) -> Seen:
        def known(of: Any) -> Any:
            return fx.node.map_arg(of, lambda other: self._seen[other])

        if node.op == "placeholder":
            return _plain(value)
        if node.op == "get_attr":
            return (
                Seen(value, self._parameter(value)) if id(value) in self._names else _plain(value)
            )
        args, kwargs = list(known(node.args)), dict(known(node.kwargs))
        module, rule, where = None, None, str(node.target)
        if node.op == "output":
            where = "the network's output"
        elif node.op == "call_module":
            module = self.fetch_attr(node.target)
            rule = MODULES.get(type(module))
            where = f"{where} ({type(module).__name__})"
        else:
            known_home = str(getattr(node.target, "__module__", "") or "torch")
            where = node.target if node.op == "call_method" else node.target.__name__
            if node.op == "call_method" or known_home.startswith(
                ("torch", "_operator", "builtins")
            ):
                rule = NAMES.get(where)
        call = Call(where, module, args, kwargs, value, self)
        if node.op in ("call_function", "call_method"):
            number = numbers(call)
            if number is not None:
                return number
        axes: Axes | None = None
        if rule is not None and isinstance(value, torch.Tensor) and _fits(call):
            axes = rule(call)
        if axes is None or not _lengths_fit(axes, value.shape):
            call.hold_all("it needs all of them" if node.op == "output" else "it has no rule")
            return _plain(value)
        return Seen(value, axes)

    def _parameter(self, tensor: Any) -> Axes:
        """Return the axes of a parameter that stands in a formula by itself."""
        role = "norm" if id(tensor) in self._parameters else "statistic"
        lengths = enumerate(tensor.shape)
        return [self.axis(tensor, axis, role) if n > 1 else None for axis, n in lengths]


def _lengths_fit(axes: Axes, shape: Any) -> bool:
    """Say whether a rule's answer is of the result's shape; what it did not foresee is unknown."""
    lengths = [n if ids is None else len(ids) for ids, n in zip(axes, shape, strict=False)]
    return len(axes) == len(shape) and lengths == list(shape)


def _plain(value: Any) -> Seen:
    return Seen(value, [None] * value.dim() if isinstance(value, torch.Tensor) else ())


def _fits(call: Call) -> bool:
    """Say whether the first argument is what rules expect."""
    if not call.args:
        return False
    if call.where in _ON_LISTS and isinstance(call.args[0], (list, tuple)):
        return all(isinstance(part, Seen) for part in call.args[0])
    if call.where in _EITHER:
        return True
    first = call.args[0]
    return isinstance(first, Seen) and isinstance(first.value, torch.Tensor)


def _groups(
    walk: _Walk, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Make groups of the units that are in the same tensors, with as many indices in each."""
    channels = walk.channels
    inside: dict[int, dict[tuple[str, int], int]] = {}
    held: dict[str, str] = {}
    roots = {
        place: [channels.find(one) for one in ids.tolist()]
        for place, (_, ids) in walk.places.items()
    }
    for place, found in roots.items():
        for root in found:
            if (why := channels.held(root)) is None:
                counts = inside.setdefault(root, {})
                counts[place] = counts.get(place, 0) + 1
            elif walk.places[place][0] == "out" and len(found) > 1:
                held.setdefault(place[0].rpartition(".")[0], why)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for root in sorted(inside):
        alike.setdefault(tuple(inside[root].items()), []).append(root)
    build = Builder(shapes)
    for signature, units in alike.items():
        of = {root: unit for unit, root in enumerate(units)}
        parts = [
            Slice(
                tensor=place[0],
                axis=place[1],
                units=tuple(of.get(root, -1) for root in roots[place]),
                role=walk.places[place][0],
            )
            for place, _ in signature
        ]
        makers = [part.tensor.rpartition(".")[0] for part in parts if part.role == "out"]
        if not makers or len(units) < 2:
            continue
        name, number = makers[0], 1
        while name in build.groups:
            number += 1
            name = f"{makers[0]}:{number}"
        build.add(name, CHANNEL, len(units), parts, None)
    return build.groups, held
