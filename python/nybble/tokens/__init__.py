"""Fewer tokens, in prompts and in images: one file a paper, one line here for each.

A :class:`TokenPolicy` says which of a prompt's tokens the deeper layers do without; a paper's class
makes one (:meth:`TokenMethod.policy`). Either goes to :func:`nybble.load` as ``tokens``, to a
recipe's ``tokens``, or as ``--prune-tokens`` to the command line. The work is done by the core
(``rust/nybble/src/tokens``), on prompts only: a token generated, or computed to be verified, is
never left out.

Leaving out tokens is lossy. What it costs must be measured on tokens behind the prompt
(:func:`nybble.eval.continuation`, ``nybble eval --prompt-tokens``): averages over the tokens that
stayed get better only because the hard ones are gone.

A :class:`PatchMethod` says which of an image's tokens the deeper layers of an encoder do without;
it goes to ``tokens`` of :meth:`nybble.runtime.encoder.ImageEncoder.encode`, and
:func:`apply` uses it on a transformers model.
"""

from __future__ import annotations

from nybble.registry import Registry
from nybble.tokens.agile_quant import AgileQuant
from nybble.tokens.attention_received import AttentionReceived
from nybble.tokens.base import TokenMethod, TokenPolicy, settings, to_json
from nybble.tokens.evit import EViT
from nybble.tokens.hooks import apply
from nybble.tokens.patches import PatchMethod
from nybble.tokens.random_patches import RandomPatches
from nybble.tokens.tome import ToMe
from nybble.tokens.tune import tune
from nybble.tokens.zero_tprune import ZeroTPrune

__all__ = [
    "METHODS",
    "PATCH_METHODS",
    "AgileQuant",
    "AttentionReceived",
    "EViT",
    "PatchMethod",
    "RandomPatches",
    "ToMe",
    "TokenMethod",
    "TokenPolicy",
    "ZeroTPrune",
    "apply",
    "settings",
    "to_json",
    "tune",
]

METHODS: Registry[TokenMethod] = Registry(
    "token reduction method",
    agile_quant=AgileQuant,
)
"""Every method by the name recipes use."""

PATCH_METHODS: Registry[PatchMethod] = Registry(
    "patch pruning method",
    attention_received=AttentionReceived,
    evit=EViT,
    random=RandomPatches,
    tome=ToMe,
    zero_tprune=ZeroTPrune,
)
"""Every method for images by name."""
