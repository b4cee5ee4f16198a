"""Fewer tokens in prompts: one file a paper, one line here for each.

A :class:`TokenPolicy` says which of a prompt's tokens the deeper layers do without; a paper's class
makes one (:meth:`TokenMethod.policy`). Either goes to :func:`nybble.load` as ``tokens``, to a
recipe's ``tokens``, or as ``--prune-tokens`` to the command line. The work is done by the core
(``rust/nybble/src/tokens``), on prompts only: a token generated, or computed to be verified, is
never left out.

Leaving out tokens is lossy. What it costs must be measured on tokens behind the prompt
(:func:`nybble.eval.continuation`, ``nybble eval --prompt-tokens``): averages over the tokens that
stayed get better only because the hard ones are gone.
"""

from __future__ import annotations

from nybble.registry import Registry
from nybble.tokens.agile_quant import AgileQuant
from nybble.tokens.base import TokenMethod, TokenPolicy, settings

__all__ = ["METHODS", "AgileQuant", "TokenMethod", "TokenPolicy", "settings"]

METHODS: Registry[TokenMethod] = Registry(
    "token reduction method",
    agile_quant=AgileQuant,
)
"""Every method by the name recipes use."""
