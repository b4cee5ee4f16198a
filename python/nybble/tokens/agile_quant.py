"""Agile-Quant's token pruning, and its split of tokens into 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nybble.tokens.base import TokenMethod, TokenPolicy

__all__ = ["AgileQuant"]


@dataclass(frozen=True)
class AgileQuant(TokenMethod):
    """Drop the prompt's tokens that attend least to the first one, more of them the deeper.

    Paper: Agile-Quant: Activation-Guided Quantization for Faster Inference of LLMs on the Edge
    (arXiv 2312.05693), and the code its authors released.

    Formula, for a pruning layer with attention ``A`` of ``H`` heads (``A[h, t, 0]`` is what token
    ``t`` gives to the start token)::

        importance(t) = sum_h A[h, t, 0]
        gamma         = 1 - (1 - beta)^(1/m)

    Each of ``m`` pruning layers removes the ``gamma n`` least important of the ``n`` tokens that
    reach it, behind the attention's residual; ``1 - beta`` of them are left after the last. The
    start token gives itself everything, so it stays. With ``bits=4`` no token is dropped: the least
    important ones have the inputs of ``o_proj``, ``gate``/``up`` and ``down`` in 4 bits instead of
    8, in that layer and all deeper ones, as in the released code.

    Parameters
    ----------
    beta
        Share of the tokens gone (or in 4 bits) after the last pruning layer. The released code
        ships with 0, the paper's tables do not name one; 0.2 is on the mild side of what is
        measured below.
    layers
        Pruning layers; ``None`` for those of :class:`~nybble.tokens.TokenPolicy`. The paper: not
        the first ones, whose attention is local.
    positions
        The released code numbers positions anew after pruning: ``"renumbered"``.
    bits
        ``None`` to drop tokens, 4 to round them.
    min_prompt
        Prompts of fewer tokens are left alone. The paper reports gains at 2048 tokens only and
        losses at shorter lengths.

    What differs here: the last token of a prompt stays too, for it gives the logits; only prompts
    are pruned; counts are taken from the prompt's length, so that rounding does not add up; and
    activations are rounded dynamically, not with static per-channel ranges. The 4-bit tokens run in
    the 8-bit kernel: the split is for accuracy studies and saves no time.

    What it costs: the paper's claim that pruning lowers the perplexity does not hold, for its
    evaluator leaves out the labels of pruned tokens. Measured on the same unpruned tokens behind
    the prompt, the start-token criterion is worse than chance where little is pruned. SmolLM2-135M
    (4-bit weights, 8-bit activations), WikiText-2, 24 prompts of 512 tokens and the 128 behind
    each, kept positions; nats a token above the 2.781 without pruning, by the share of token-layers
    that is saved (``beta`` 0.231, 0.443, 0.630, 0.909)::

        saved       10 %      20 %      30 %      50 %
        start      +0.081    +0.163    +0.237    +0.447
        random     +0.052    +0.124    +0.215    +0.491
        received   +0.058    +0.128    +0.190    +0.324

    Beside random the start token's differences are +0.029 +- 0.009, +0.039 +- 0.014, +0.022 +-
    0.026 and -0.044 +- 0.030 (standard errors over the prompts). With renumbered positions it is
    +0.096, +0.245 and +0.409 at 10, 30 and 50 %. The split costs little: +0.009 with half of the
    tokens in 4 bits and +0.019 with nine in ten; a random choice costs no more (+0.009, +0.016).
    """

    beta: float = 0.2
    layers: Sequence[int] | None = None
    positions: str = "renumbered"
    bits: int | None = None
    min_prompt: int = 64

    def __post_init__(self) -> None:
        self.policy()  # checks every setting

    def policy(self) -> TokenPolicy:
        """Return the parts it is made of."""
        from nybble.errors import ArgumentError

        if self.bits not in (None, 4):
            message = f"tokens.bits: expected 4, or none to drop tokens, found {self.bits!r}"
            raise ArgumentError(message)
        return TokenPolicy(
            ratio=self.beta,
            criterion="start",
            layers=self.layers,
            positions=self.positions,
            action="drop" if self.bits is None else "4bit",
            min_prompt=self.min_prompt,
        )
