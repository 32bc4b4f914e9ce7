"""Search a small network for symmetries that its spec lacks: ``verify`` proves soundness, this maximality.

The search knows nothing of the rules by which specs are traced: it proposes *moves* (``_families``), keeps those
sets of moves under which the network computes the same (``_graph_pass``; ``_scalings`` for positive factors), and
leaves out what the spec has (``_claimed``).
"""

from weightspace.spec.maximality._missed import missed_symmetries
from weightspace.spec.maximality._moves import MissedSymmetry, Move

__all__ = ["MissedSymmetry", "Move", "missed_symmetries"]
