"""Bringing one network's units onto another's: the same function, written so that weights can be compared."""

from weightspace.align._data import Batches, Loss
from weightspace.align._registry import MATCHERS, Matcher, align_networks, find_matcher, matcher
from weightspace.align._report import MatchReport
from weightspace.align._weight_matching import MATCHED, weight_matching

__all__ = [
    "MATCHED",
    "MATCHERS",
    "Batches",
    "Loss",
    "MatchReport",
    "Matcher",
    "align_networks",
    "find_matcher",
    "matcher",
    "weight_matching",
]
