"""Bringing one network's units onto another's: the same function, written so that weights can be compared."""

from weightspace.align._weight_matching import MATCHED, MatchReport, weight_matching

__all__ = ["MATCHED", "MatchReport", "weight_matching"]
