"""Bringing one network's units onto another's: the same function, written so that weights can be compared."""

from weightspace.align._weight_matching import MatchReport, weight_matching

__all__ = ["MatchReport", "weight_matching"]
