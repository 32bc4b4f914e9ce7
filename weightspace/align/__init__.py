"""Bringing one network's units onto another's: the same function, written so that weights can be compared."""

from weightspace.align._activation_matching import activation_matching
from weightspace.align._cycle_consistent import cycle_consistent
from weightspace.align._data import Batches, Loss
from weightspace.align._merge_many import merge_many
from weightspace.align._registry import MATCHERS, Matcher, align_networks, find_matcher, matcher
from weightspace.align._repair import LayerStatistics, layer_statistics, repair, reset_batch_norm
from weightspace.align._report import MatchReport
from weightspace.align._sinkhorn import doubly_stochastic, sinkhorn
from weightspace.align._soft import act_soft, matrices_of, round_matrices
from weightspace.align._starlight import starlight
from weightspace.align._straight_through import straight_through
from weightspace.align._weight_matching import MATCHED, weight_matching
from weightspace.align.judging import (
    BarrierReport,
    CycleReport,
    FunctionalDistance,
    LossSurface,
    SingularVectorReport,
    barrier,
    compare_barriers,
    cycle_error,
    draw_barriers,
    functional_distance,
    loss_surface,
    singular_vectors,
)

__all__ = [
    "MATCHED",
    "MATCHERS",
    "BarrierReport",
    "Batches",
    "CycleReport",
    "FunctionalDistance",
    "LayerStatistics",
    "Loss",
    "LossSurface",
    "MatchReport",
    "Matcher",
    "SingularVectorReport",
    "act_soft",
    "activation_matching",
    "align_networks",
    "barrier",
    "compare_barriers",
    "cycle_consistent",
    "cycle_error",
    "doubly_stochastic",
    "draw_barriers",
    "find_matcher",
    "functional_distance",
    "layer_statistics",
    "loss_surface",
    "matcher",
    "matrices_of",
    "merge_many",
    "repair",
    "reset_batch_norm",
    "round_matrices",
    "singular_vectors",
    "sinkhorn",
    "starlight",
    "straight_through",
    "weight_matching",
]
