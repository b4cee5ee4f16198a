"""What operators of torch do to channels: a rule for each kind, by type or by name.

A rule is given a call and returns the axes of its result. Whatever has no rule here holds the
channels that it reads: they stay whole, and so does what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from nybble.prune.networks.channels import Axes, Channels, Ids, Seen

__all__ = ["MODULES", "NAMES", "Call", "Tensors", "numbers"]


class Tensors(Protocol):
    """The parameters of the network that is traced."""

    channels: Channels

    def axis(self, tensor: Any, axis: int, role: str) -> Ids:
        """Return the numbers of an axis of a parameter or buffer."""


@dataclass(frozen=True)
class Call:
    """One call in the network.

    Parameters
    ----------
    where
        The module's path, or the function's name.
    module
        The module, if it is one.
    args, kwargs
        What it is called with: :class:`Seen`, or plain values that stand in the code.
    value
        What it returned.
    tensors
        The network's parameters.
    """

    where: str
    module: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    value: Any
    tensors: Tensors

    @property
    def first(self) -> Seen:
        """What most operators work on."""
        seen: Seen = self.args[0]
        return seen

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def hold(self, ids: Ids | None, why: str) -> None:
        """Let channels stay."""
        self.tensors.channels.hold(ids, f"{self.where}: {why}")

    def hold_all(self, why: str) -> None:
        """Let all channels stay that are in the arguments."""
        for seen in _all_seen([*self.args, *self.kwargs.values()]):
            for ids in seen.ids():
                self.hold(ids, why)

    def join(self, some: Ids | None, others: Ids | None, why: str) -> Ids | None:
        """Unite channels at the same places; those that meet something else stay."""
        if some is None or others is None:
            self.hold(some, why)
            self.hold(others, why)
            return None
        self.tensors.channels.unite(some, others)
        return some

    def read(self, ids: Ids | None, tensor: Any, axis: int, role: str) -> Ids:
        """Unite channels with the axis of a parameter that is for them; return the axis."""
        own = self.tensors.axis(tensor, axis, role)
        self.join(ids, own, "not all that it reads are channels")
        return own


Rule = Callable[[Call], "Axes | None"]


def _all_seen(value: Any) -> list[Seen]:
    if isinstance(value, Seen):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, slice):
        value = [value.start, value.stop, value.step]
    if isinstance(value, (list, tuple)):
        return [seen for one in value for seen in _all_seen(one)]
    return []


def _same(call: Call) -> Axes | None:
    """Pass channels on, where values are changed one by one."""
    others = _all_seen([*call.args[1:], *call.kwargs.values()])
    if any(True for seen in others for _ in seen.ids()):
        return None
    return call.first.axes


def _linear(call: Call) -> Axes | None:
    x = call.first
    weight = call.module.weight
    call.read(x.axes[-1], weight, 1, "in")
    out = call.tensors.axis(weight, 0, "out")
    if call.module.bias is not None:
        call.read(out, call.module.bias, 0, "out")
    return [*x.axes[:-1], out]


def _convolution(call: Call) -> Axes | None:
    """Give new channels; a group of a grouped one is one unit, with what it reads and gives."""
    x, module = call.first, call.module
    if x.value.dim() != module.weight.dim():
        return None
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    if transposed and module.groups > 1:
        return None
    for ids in x.axes[2:]:
        call.hold(ids, "it is a place to this convolution")
    out_axis = 1 if transposed else 0
    out = call.tensors.axis(module.weight, out_axis, "out")
    if module.groups > 1:
        if x.axes[1] is None:
            call.hold(out, "not all that it reads are channels")
        else:
            first = [_tied(call, ids, module.groups) for ids in (x.axes[1], out)]
            call.tensors.channels.unite(*first)
    else:
        call.read(x.axes[1], module.weight, 1 - out_axis, "in")
    if module.bias is not None:
        call.read(out, module.bias, 0, "out")
    return [x.axes[0], out, *[None] * (x.value.dim() - 2)]


def _tied(call: Call, ids: Ids, groups: int) -> Ids:
    """Make the channels of each group one unit; return the first ones of the groups."""
    first = ids.reshape(groups, -1)[:, 0]
    call.tensors.channels.unite(ids, np.repeat(first, len(ids) // groups))
    return first


def _channel_norm(call: Call) -> Axes | None:
    """Pass channels on, each with its own gain and statistics."""
    x, module = call.first, call.module
    if x.value.dim() < 2:
        return None
    for name, role in (
        ("weight", "norm"),
        ("bias", "norm"),
        ("running_mean", "statistic"),
        ("running_var", "statistic"),
    ):
        if getattr(module, name, None) is not None:
            call.read(x.axes[1], getattr(module, name), 0, role)
    return x.axes


def _group_norm(call: Call) -> Axes | None:
    """Make the channels that are normalised together one unit."""
    x, module = call.first, call.module
    ids = x.axes[1]
    if module.num_groups == 1 or module.weight is None:
        return None
    if ids is not None:
        _tied(call, ids, module.num_groups)
    for tensor in (module.weight, module.bias):
        if tensor is not None:
            call.read(ids, tensor, 0, "norm")
    return x.axes


def _last_norm(call: Call) -> Axes | None:
    """Hold what is normalised together: without some of it the rest would differ."""
    x, module = call.first, call.module
    over = len(module.normalized_shape)
    for ids in x.axes[-over:]:
        call.hold(ids, "channels are normalised together")
    for tensor in (module.weight, getattr(module, "bias", None)):
        if tensor is not None:
            for axis in range(tensor.dim()):
                call.hold(call.tensors.axis(tensor, axis, "norm"), "they are normalised together")
    return [*x.axes[:-over], *[None] * over]


def _prelu(call: Call) -> Axes | None:
    x, module = call.first, call.module
    if module.num_parameters > 1:
        call.read(x.axes[1], module.weight, 0, "norm")
    return x.axes


def _embedding(call: Call) -> Axes | None:
    x = call.first
    return [*x.axes, call.tensors.axis(call.module.weight, 1, "out")]


def _pool(call: Call) -> Axes | None:
    """Pass channels on, where places are joined."""
    x = call.first
    if not isinstance(call.value, torch.Tensor) or call.value.shape[:2] != x.value.shape[:2]:
        return None
    for ids in x.axes[2:]:
        call.hold(ids, "they are pooled together")
    return [*x.axes[:2], *[None] * (call.value.dim() - 2)]


def _binary(call: Call) -> Axes | None:
    """Unite the channels of two tensors that meet value by value, short axes repeated."""
    axes: list[Ids | None] = [None] * call.value.dim()
    lengths = [1] * len(axes)
    for seen in (one for one in call.args[:2] if isinstance(one, Seen)):
        call.hold(seen.counted, "it counts channels")
        if not isinstance(seen.value, torch.Tensor):
            continue
        for place, length in enumerate(seen.value.shape):
            at, ids = place + len(axes) - seen.value.dim(), seen.axes[place]
            if length == 1:
                continue
            axes[at] = ids if lengths[at] == 1 else call.join(axes[at], ids, "not all are channels")
            lengths[at] = length
    return axes


def _flatten(call: Call) -> Axes | None:
    return _reshaped(call, None)


def _view(call: Call) -> Axes | None:
    given = call.args[1:] or (call.kwargs.get("shape"),)
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = given[0]
    if len(given) == 1 and isinstance(given[0], Seen) and given[0].sizes is not None:
        given = [Seen(None, counted=ids) for ids in given[0].sizes]
    return _reshaped(call, list(given)) if len(given) == call.value.dim() else None


def _reshaped(call: Call, given: list[Any] | None) -> Axes | None:
    """Match axes before and after by their products.

    Channels may be joined with places, each then having a run or a comb of indices. They cannot be
    divided, nor brought to a length that stands in the code.
    """
    x = call.first
    before = [(n, ids) for n, ids in zip(x.value.shape, x.axes, strict=True) if n != 1]
    places = [place for place, length in enumerate(call.value.shape) if length != 1]
    axes: list[Ids | None] = [None] * call.value.dim()
    while before and places:
        block, ends = [before.pop(0)], [places.pop(0)]
        while (inside := int(np.prod([n for n, _ in block]))) != (
            outside := int(np.prod([call.value.shape[place] for place in ends]))
        ):
            if inside < outside:
                block.append(before.pop(0))
            else:
                ends.append(places.pop(0))
        labelled = [place for place, (_, ids) in enumerate(block) if ids is not None]
        if not labelled:
            continue
        counted = given[ends[0]] if given is not None and len(ends) == 1 else -1
        fits = counted == -1 if not isinstance(counted, Seen) else counted.counted is not None
        if len(labelled) == 1 and len(ends) == 1 and fits:
            ids = block[labelled[0]][1]
            assert ids is not None
            shape = [1] * len(block)
            shape[labelled[0]] = len(ids)
            whole = np.broadcast_to(ids.reshape(shape), [n for n, _ in block])
            axes[ends[0]] = whole.reshape(-1)
        else:
            why = "it divides channels, or brings them to a length that stands in the code"
            for place in labelled:
                call.hold(block[place][1], why)
    return axes


def _concatenated(call: Call) -> Axes | None:
    parts = call.args[0]
    dim = call.argument(1, "dim", 0)
    if not isinstance(dim, int) or not isinstance(parts, (list, tuple)):
        return None
    dim %= call.value.dim()
    axes: list[Ids | None] = list(parts[0].axes)
    for part in parts[1:]:
        for place, ids in enumerate(part.axes):
            if place != dim and (ids is not None or axes[place] is not None):
                axes[place] = call.join(axes[place], ids, "not all are channels")
    pieces = [part.axes[dim] for part in parts]
    if all(ids is None for ids in pieces):
        return axes
    # Parts that are no channels stay: they have numbers of their own, which are held.
    whole = []
    for part, ids in zip(parts, pieces, strict=True):
        if ids is None:
            ids = call.tensors.channels.new(part.value.shape[dim])
            call.hold(ids, "not all that is joined are channels")
        whole.append(ids)
    axes[dim] = np.concatenate(whole)
    return axes


def _permuted(call: Call) -> Axes | None:
    given = call.args[1:] or (call.kwargs.get("dims"),)
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = given[0]
    order = [place for place in given if isinstance(place, int)]
    return [call.first.axes[place] for place in order] if len(order) == len(given) else None


def _transposed(call: Call) -> Axes | None:
    first, second = call.argument(1, "dim0"), call.argument(2, "dim1")
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    axes = list(call.first.axes)
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def _reduced(call: Call) -> Axes | None:
    """Hold what is added up; the other axes stay what they are."""
    x, dims = call.first, call.argument(1, "dim")
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, (list, tuple)) or not all(isinstance(d, int) for d in dims):
        return None
    if not isinstance(call.value, torch.Tensor):
        return None
    gone = {d % x.value.dim() for d in dims}
    kept = call.value.dim() == x.value.dim()
    axes: list[Ids | None] = []
    for place, ids in enumerate(x.axes):
        if place in gone:
            call.hold(ids, "they are added up")
        if place not in gone or kept:
            axes.append(None if place in gone else ids)
    return axes


def _unsqueezed(call: Call) -> Axes | None:
    dim = call.argument(1, "dim")
    if not isinstance(dim, int):
        return None
    axes = list(call.first.axes)
    axes.insert(dim % call.value.dim(), None)
    return axes


_FACTS = ("device", "dtype", "ndim")  # what of a tensor does not depend on its channels


def numbers(call: Call) -> Seen | None:
    """Return what is known of lengths, and of numbers made from them; ``None`` otherwise."""
    seen = _all_seen(list(call.args))
    if call.where == "getattr" and call.args[1] == "shape":
        return Seen(call.value, sizes=call.args[0].axes)
    if call.where == "dim" or (call.where == "getattr" and call.args[1] in _FACTS):
        return Seen(call.value)
    if call.where == "size":
        axes = call.args[0].axes
        dim = call.argument(1, "dim")
        if dim is None:
            return Seen(call.value, sizes=axes)
        return Seen(call.value, counted=axes[dim] if isinstance(dim, int) else None)
    if call.where == "getitem" and seen and seen[0].sizes is not None:
        place = call.args[1]
        if isinstance(place, int):
            return Seen(call.value, counted=seen[0].sizes[place])
        if isinstance(place, slice) and not _all_seen(place):
            return Seen(call.value, sizes=seen[0].sizes[place])
    if isinstance(call.value, (int, float)) and not any(one.axes for one in seen):
        found = [ids for one in seen for ids in one.ids()]
        return Seen(call.value, counted=np.concatenate(found) if found else None)
    return None


MODULES: dict[type, Rule] = {
    **dict.fromkeys(
        (
            nn.CELU,
            nn.ELU,
            nn.GELU,
            nn.Hardsigmoid,
            nn.Hardswish,
            nn.Hardtanh,
            nn.LeakyReLU,
            nn.Mish,
            nn.ReLU,
            nn.ReLU6,
            nn.SELU,
            nn.SiLU,
            nn.Sigmoid,
            nn.Softplus,
            nn.Tanh,
        ),
        _same,
    ),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _same),
    nn.PReLU: _prelu,
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.Flatten: _flatten,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _last_norm,
    nn.RMSNorm: _last_norm,
    **dict.fromkeys(
        (
            nn.Conv1d,
            nn.Conv2d,
            nn.Conv3d,
            nn.ConvTranspose1d,
            nn.ConvTranspose2d,
            nn.ConvTranspose3d,
        ),
        _convolution,
    ),
    **dict.fromkeys(
        (
            nn.BatchNorm1d,
            nn.BatchNorm2d,
            nn.BatchNorm3d,
            nn.InstanceNorm1d,
            nn.InstanceNorm2d,
            nn.InstanceNorm3d,
        ),
        _channel_norm,
    ),
    **dict.fromkeys(
        [
            getattr(nn, f"{kind}Pool{rank}d")
            for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg")
            for rank in (1, 2, 3)
        ]
        + [nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d],
        _pool,
    ),
}
"""Rules of modules, by their exact type: a subclass may do anything."""


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


NAMES: dict[str, Rule] = {
    **_named(
        _same,
        "relu relu_ relu6 gelu silu leaky_relu elu selu celu mish softplus hardtanh hardswish "
        "hardsigmoid sigmoid sigmoid_ tanh tanh_ abs neg exp sqrt rsqrt square erf clamp clamp_ "
        "dropout dropout2d contiguous clone float detach",
    ),
    **_named(
        _binary,
        "add add_ iadd sub sub_ isub mul mul_ imul div div_ truediv itruediv maximum minimum pow",
    ),
    **_named(_flatten, "flatten"),
    **_named(_view, "view reshape"),
    **_named(_concatenated, "cat concat concatenate"),
    **_named(_permuted, "permute"),
    **_named(_transposed, "transpose"),
    **_named(_reduced, "mean sum amax amin"),
    **_named(_unsqueezed, "unsqueeze"),
    **_named(
        _pool,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d interpolate",
    ),
}
"""Rules of functions and methods of torch, by name."""
