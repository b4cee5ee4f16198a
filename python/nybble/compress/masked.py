"""Activation sparsity in transformers' models: the zeros of the run time, with gradients around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nybble.errors import UnsupportedError
from nybble.sparsity import Thresholds

__all__ = ["mask"]


def mask(
    torch: Any, model: Any, layers: Sequence[dict[str, Any]], thresholds: Sequence[Thresholds]
) -> None:
    """Take for zero in a model what thresholds say; gradients are those of the values left.

    Parameters
    ----------
    torch
        The library.
    model
        transformers' model, its linears in their final places.
    layers
        The parts of its layers (:meth:`nybble._nybble.Checkpoint.plan`).
    thresholds
        Those of each layer.

    Raises
    ------
    UnsupportedError
        When neurons have thresholds and the model's gates have no activation function of their own.
    """

    def cut(x: Any, least: Any) -> Any:
        return torch.where(x.abs() <= least, torch.zeros((), dtype=x.dtype), x)

    def read(linears: Sequence[str], least: Any) -> None:
        for name in linears:
            linear = model.get_submodule(name)
            linear.register_forward_pre_hook(lambda _, args: (cut(args[0], least), *args[1:]))

    for parts, limits in zip(layers, thresholds, strict=True):
        attention, mlp = parts["attention"] or {}, parts["mlp"] or {}
        qkv = attention.get("qkv", ())
        readers = {
            "q": qkv[:1],
            "qkv": qkv,
            "out": [attention.get("out")],
            "gate_up": [mlp.get("gate"), mlp.get("up")],
            "down": [mlp.get("down")],
        }
        for name, threshold in limits.inputs.items():
            if threshold > 0:
                read([linear for linear in readers[name] if linear], threshold)
        if limits.neurons is None or not mlp:
            continue
        neurons = torch.from_numpy(limits.neurons)
        if not mlp.get("gate"):  # what down reads are the activation function's values
            read([mlp["down"]], neurons)
            continue
        block = model.get_submodule(mlp["gate"].rpartition(".")[0])
        if not isinstance(getattr(block, "act_fn", None), torch.nn.Module):
            message = f"{mlp['gate']}: a tuning with thresholds of neurons is not supported where "
            message += "no activation function stands beside the gate"
            raise UnsupportedError(message)
        block.act_fn.register_forward_hook(lambda _, args, y, least=neurons: cut(y, least))
