"""Weights that are taken out for good: heads, neurons, layers, or single weights.

One file a paper, one line here for each. A method is made of pieces that can be had one by one:
units (:mod:`nybble.prune.graph`), what is seen of them (:mod:`nybble.prune.evidence`), criteria,
allocators (:mod:`nybble.prune.allocate`), compensators (:mod:`nybble.prune.compensate`), and the
plan that comes of it (:mod:`nybble.prune.plan`), which masks or cuts. A recipe's ``prune`` names a
method.
"""

from __future__ import annotations

from nybble.prune.adapt_pruner import AdaptPruner
from nybble.prune.base import Criterion, PruneMethod, Sparse, Structured
from nybble.prune.block_similarity import BlockSimilarity
from nybble.prune.cfsp import Cfsp
from nybble.prune.evidence import Evidence, Lens, Subject
from nybble.prune.flap import Flap
from nybble.prune.gblm import Gblm
from nybble.prune.graph import Group, Slice, UnitGraph, transformer
from nybble.prune.llm_pruner import LlmPruner
from nybble.prune.lottery import LotteryTickets
from nybble.prune.magnitude import Magnitude
from nybble.prune.magnitude_units import MagnitudeUnits
from nybble.prune.normalised import Normalised
from nybble.prune.perp import Perp
from nybble.prune.plan import Cut, Plan, apply_masks, structure
from nybble.prune.random_units import RandomUnits
from nybble.prune.random_weights import RandomWeights
from nybble.prune.reconstruction import Reconstruction
from nybble.prune.recovery import Patient, Recovery
from nybble.prune.refit import Refit
from nybble.prune.sparsegpt import SparseGpt
from nybble.prune.wanda import Wanda
from nybble.registry import Registry

__all__ = [
    "METHODS",
    "RECOVERIES",
    "AdaptPruner",
    "BlockSimilarity",
    "Cfsp",
    "Criterion",
    "Cut",
    "Evidence",
    "Flap",
    "Gblm",
    "Group",
    "Lens",
    "LlmPruner",
    "LotteryTickets",
    "Magnitude",
    "MagnitudeUnits",
    "Normalised",
    "Patient",
    "Perp",
    "Plan",
    "PruneMethod",
    "RandomUnits",
    "RandomWeights",
    "Reconstruction",
    "Recovery",
    "Refit",
    "Slice",
    "Sparse",
    "SparseGpt",
    "Structured",
    "Subject",
    "UnitGraph",
    "Wanda",
    "apply_masks",
    "structure",
    "transformer",
]

METHODS: Registry[PruneMethod] = Registry(
    "pruning method",
    adapt_pruner=AdaptPruner,
    block_similarity=BlockSimilarity,
    cfsp=Cfsp,
    flap=Flap,
    gblm=Gblm,
    llm_pruner=LlmPruner,
    magnitude=Magnitude,
    magnitude_units=MagnitudeUnits,
    random=RandomWeights,
    random_units=RandomUnits,
    refit=Refit,
    sparsegpt=SparseGpt,
    wanda=Wanda,
)
"""Every method by the name recipes use."""

RECOVERIES: Registry[Recovery] = Registry(
    "recovery",
    perp=Perp,
    reconstruction=Reconstruction,
)
"""What can be trained after a cut, by the name recipes use."""
