"""Cutting a torch module: its tensors without the units that go, its modules told the new sizes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from nybble.prune.graph import UnitGraph
from nybble.prune.plan import Cut, Plan

__all__ = ["cut"]


def cut(module: nn.Module, graph: UnitGraph, plan: Plan) -> Any:
    """Return a copy of a network without what a plan removes.

    Parameters
    ----------
    module
        The network, which stays as it is.
    graph
        Its units.
    plan
        The plan, which is checked.
    """
    knife = Cut(graph, plan)
    changed = set(graph.kept_axes(plan.keep)) | set(plan.masks)
    small = copy.deepcopy(module)
    made = {}
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        if name in changed:
            values = torch.from_numpy(knife.cut(name, tensor.detach().numpy()))
            if isinstance(tensor, nn.Parameter):
                values = nn.Parameter(values, requires_grad=tensor.requires_grad)
            made[id(tensor)] = values
    for part in small.modules():
        groups = _groups(part, made)
        for own in (part._parameters, part._buffers):
            own.update({leaf: made.get(id(tensor), tensor) for leaf, tensor in own.items()})
        _tell(part, groups)
    return small


def _groups(part: nn.Module, made: dict[int, Any]) -> int:
    """Return how many groups a convolution or a norm has afterwards; whole ones go."""
    weight = getattr(part, "weight", None)
    before = getattr(part, "groups", getattr(part, "num_groups", 1))
    if not isinstance(weight, torch.Tensor):
        return int(before)
    return int(before * made.get(id(weight), weight).shape[0] // weight.shape[0])


def _tell(part: nn.Module, groups: int) -> None:
    """Bring what a module says of its sizes in line with its tensors."""
    shape: Any = getattr(getattr(part, "weight", None), "shape", ())
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = shape
    elif isinstance(part, nn.Embedding):
        part.num_embeddings, part.embedding_dim = shape
    elif isinstance(part, nn.modules.conv._ConvTransposeNd):
        part.in_channels, part.out_channels = shape[0], shape[1] * part.groups
    elif isinstance(part, nn.modules.conv._ConvNd):
        part.groups = groups if part.groups > 1 else 1
        part.out_channels, part.in_channels = shape[0], shape[1] * part.groups
    elif isinstance(part, nn.GroupNorm) and shape:
        part.num_groups, part.num_channels = groups, shape[0]
    elif isinstance(part, nn.PReLU):
        part.num_parameters = shape[0]
    elif isinstance(part, (nn.modules.batchnorm._NormBase)):
        known = [t for t in (part.weight, part.running_mean) if t is not None]
        part.num_features = known[0].shape[0] if known else part.num_features
