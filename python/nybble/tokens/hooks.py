"""Prune the tokens of a transformers model: public hooks that ask the same Rust code.

::

    with nybble.tokens.apply(model, ZeroTPrune(layers=(2, 5), keep=0.7)):
        logits = model(pixel_values=pixels).logits

An attention function (``AttentionInterface``) looks at queries and keys of the pruning layers, and
forward hooks take the patches that leave out of those layers' outputs; nothing is patched or
forked, and when the block ends the model is as it was. Which patches stay is decided by the code
the run-time uses.

A method that prunes between attention and feed-forward block here prunes behind the block: rows do
not meet in it, so the tokens that stay are the same, and only that block's time is not saved. What
is merged would have to be merged before it, which no hook can do: EViT with ``fuse`` and ToMe are
for :func:`nybble.load` only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from nybble import _nybble
from nybble.errors import ArgumentError, UnsupportedError
from nybble.tokens.patches import PatchMethod, patch_method

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from transformers import PreTrainedModel

__all__ = ["Kept", "apply"]

_NAME = "nybble_patches"
_FAMILIES = {
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
}
"""Learned tokens before the patches by ``model_type``; registers are added."""

_current: list[_Pruning] = []
"""The models that are being pruned, innermost last."""


class Kept:
    """What :func:`apply` left of the last batch.

    Parameters
    ----------
    places
        Which patches stayed, ``[images, patches]``, counted row by row; ``None`` before the first
        batch.
    """

    def __init__(self) -> None:
        self.places: npt.NDArray[np.uint32] | None = None


class _Pruning:
    """One model in an ``apply`` block."""

    def __init__(self, model: PreTrainedModel, policy: dict[str, Any], before: str) -> None:
        self.policy, self.before = json.dumps(policy), before
        self.where = frozenset(policy["layers"])
        config = model.config
        learned = _FAMILIES[config.model_type]
        self.learned = learned + getattr(config, "num_register_tokens", 0)
        self.layers = _layers(model)
        self.attention = {
            id(getattr(layer, "attention", None) or layer.self_attn): index
            for index, layer in enumerate(self.layers)
        }
        self.chosen: torch.Tensor | None = None
        self.kept = Kept()

    def choose(self, layer: int, q: torch.Tensor, k: torch.Tensor, scale: float) -> None:
        """Decide for every image, from its heads' queries and keys ``[images, heads, n, dim]``."""
        import torch

        with torch.no_grad():
            shares = torch.softmax((q.float() @ k.float().transpose(2, 3)) * scale, dim=-1)
            keys = k.float().transpose(1, 2).flatten(2).contiguous()
        rows = []
        for image in range(len(q)):
            kept = _nybble.choose_patches(
                self.policy,
                layer,
                len(self.layers),
                image,
                shares[image].cpu().numpy(),
                keys[image].cpu().numpy(),
                self.learned,
            )
            if kept is None:
                return
            rows.append(kept)
        self.chosen = torch.tensor(rows, device=q.device)

    def begin(self, tokens: torch.Tensor) -> None:
        """Forget the batch before."""
        import numpy as np

        patches = tokens.shape[1] - self.learned
        self.chosen = None
        self.kept.places = np.tile(np.arange(patches, dtype=np.uint32), (len(tokens), 1))

    def leave(self, output: Any) -> Any:
        """Take what leaves out of a layer's output."""
        import numpy as np

        if self.chosen is None:
            return output
        chosen, self.chosen = self.chosen, None
        states = output if not isinstance(output, tuple) else output[0]
        left = states.gather(1, chosen.unsqueeze(2).expand(-1, -1, states.shape[2]))
        places = chosen[:, self.learned :].cpu().numpy() - self.learned
        assert self.kept.places is not None  # set when the batch began
        self.kept.places = np.take_along_axis(self.kept.places, places, axis=1)
        return left if not isinstance(output, tuple) else (left, *output[1:])


@contextmanager
def apply(model: PreTrainedModel, tokens: PatchMethod | Mapping[str, Any] | str) -> Iterator[Kept]:
    """Prune a transformers image encoder's patches for the time of a ``with`` block.

    Parameters
    ----------
    model
        ViT, DeiT, DINOv2 (with registers or without), or a vision tower of CLIP or SigLIP; of a
        model that has such a tower, that tower is pruned.
    tokens
        A method in :data:`nybble.tokens.PATCH_METHODS`, its name, or a mapping with its ``name``
        and its settings.

    Yields
    ------
    What was kept of the last batch.

    Raises
    ------
    UnsupportedError
        For another model, or a method that merges.
    ArgumentError
        For settings that mean nothing.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    policy = patch_method(tokens).settings()
    if "tome" in policy["method"] or policy["method"].get("class_row", {}).get("fuse"):
        message = (
            "merging tokens is not supported on transformers models: it happens inside a layer, "
            "where no hook reaches; use nybble.load, or a method that drops"
        )
        raise UnsupportedError(message)
    tower = _tower(model)
    before = tower.config._attn_implementation
    pruning = _Pruning(tower, policy, before)
    if policy["layers"][-1] >= len(pruning.layers):
        message = (
            f"tokens.layers: expected layers below {len(pruning.layers)}, found {policy['layers']}"
        )
        raise ArgumentError(message)
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    with ExitStack() as undo:
        for index, layer in enumerate(pruning.layers):
            if index == 0:
                undo.enter_context(
                    _removed(
                        layer.register_forward_pre_hook(lambda _, inputs: pruning.begin(inputs[0]))
                    )
                )
            if index in pruning.where:
                undo.enter_context(
                    _removed(
                        layer.register_forward_hook(lambda _, __, output: pruning.leave(output))
                    )
                )
        undo.callback(tower.set_attn_implementation, before)
        tower.set_attn_implementation(_NAME)
        _current.append(pruning)
        undo.callback(_current.remove, pruning)
        yield pruning.kept


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as PyTorch does, and decide who stays where a layer prunes."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for pruning in _current:
        layer = pruning.attention.get(id(module))
        if layer is not None and layer in pruning.where:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            pruning.choose(layer, query, key, scale)
    result: tuple[torch.Tensor, torch.Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return result


def _tower(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that encodes images."""
    for part in (model, getattr(model, "vision_model", None), getattr(model, "base_model", None)):
        if part is not None and _kind(part) in _FAMILIES:
            return part
    message = (
        f"pruning patches of a {_kind(model)} model is not supported "
        f"(supported: {', '.join(_FAMILIES)})"
    )
    raise UnsupportedError(message)


def _kind(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _layers(model: PreTrainedModel) -> list[Any]:
    from torch import nn

    found = [list(part) for part in model.modules() if isinstance(part, nn.ModuleList)]
    return max(
        (
            layers
            for layers in found
            if hasattr(layers[0], "attention") or hasattr(layers[0], "self_attn")
        ),
        key=len,
    )
