"""The search itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from weightspace.errors import SpecError
from weightspace.spec._types import Symmetry, Weights, WeightSpec
from weightspace.spec.maximality._claimed import SignSpan, can_reorder
from weightspace.spec.maximality._families import families
from weightspace.spec.maximality._graph_pass import GraphPass
from weightspace.spec.maximality._moves import (
    PRECISION,
    Algebra,
    Change,
    Flips,
    MissedSymmetry,
    Move,
    Swaps,
    by_tensor,
)
from weightspace.spec.maximality._network import Network
from weightspace.spec.maximality._scalings import missed_scalings
from weightspace.spec.tracing import Inputs

KINDS: tuple[Symmetry, ...] = ("permutation", "positive", "sign")


def missed_symmetries(
    spec: WeightSpec,
    module: nn.Module,
    inputs: Inputs,
    *,
    outputs: str | Sequence[str | int] | None = None,
    symmetries: Sequence[Symmetry] = KINDS,
    seed: int = 0,
) -> list[MissedSymmetry]:
    """Symmetries of a small network that its spec lacks; an empty list for a maximal spec.

    For networks of a few thousand parameters, whose widths should differ: permutations take one pass over the
    graph for every number of units and every stride into which an axis factors. What is found is checked on the
    whole network, so nothing in the list is a false alarm about the *function*; whether the spec should have it
    is another question: an input that never varies frees the units that read it; and the pair of features that a
    rotary position turns may be scaled, though pairs of other frequencies are no units of one group. One
    missing group shows in several ways: as exchanges of single units, and of blocks of them.

    Not found: permutations that no exchange of the first two, the last two, or the first and the last of a number
    of equal blocks shows; symmetries under which some value within the network is not merely reordered or rescaled
    (rotations); mixtures of both; units whose index is spread over two axes and which move for one outer unit
    only; phases. Left out on purpose: what no output depends on; one positive factor common to all units of a
    group; positive factors of running statistics, as those that training would estimate keep no such symmetry.

    Args:
        spec: what is claimed; sound, as :func:`weightspace.spec.verify` finds.
        module: the network; it must be exportable, and is not changed.
        inputs: example inputs, as for :func:`weightspace.spec.trace`.
        outputs: names of the outputs that count; all by default.
        symmetries: which kinds to look for: ``"permutation"``, ``"positive"``, ``"sign"``.
        seed: seed of the random weights.

    Raises:
        SpecError: the module cannot be exported, the spec is of another module, or a kind of symmetry cannot
            be searched for.

    Example:
        >>> from dataclasses import replace
        >>> from weightspace.spec import Frozen, WeightSpec
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> spec = WeightSpec.trace(net, torch.randn(5, 2))
        >>> missed_symmetries(spec, net, torch.randn(5, 2))
        []
        >>> poorer = replace(spec, scalings=Frozen())
        >>> print(missed_symmetries(poorer, net, torch.randn(5, 2), symmetries=["positive"])[0])
        positive: 0.weight axis 0 units 2 ^1, 0.bias axis 0 units 2 ^1, 2.weight axis 1 units 2 ^-1
    """
    for kind in symmetries:
        if kind not in KINDS:
            raise SpecError(f"symmetries: expected some of {', '.join(KINDS)}, found {kind!r}")
    network = Network(spec, module, inputs, outputs, seed)
    found: list[MissedSymmetry] = []
    for kind in symmetries:
        if kind == "positive":
            found += missed_scalings(network)
        elif kind in ("permutation", "sign"):
            found += _missed_moves(network, kind)
    return found


def _missed_moves(network: Network, kind: Literal["permutation", "sign"]) -> list[MissedSymmetry]:
    """Preserving sets of moves outside the spec."""
    spec = network.spec
    algebra: Algebra = Swaps() if kind == "permutation" else Flips()
    signs = SignSpan(spec)
    search = GraphPass(network, algebra)
    missed: dict[frozenset[Move], MissedSymmetry] = {}
    for family in families(spec, network.program, pairs=kind == "permutation"):
        for moves in search.preserving(family):
            changes = by_tensor(spec, algebra, moves)
            claimed = can_reorder(spec, changes) if kind == "permutation" else signs.can_flip(changes)
            if moves in missed or claimed:
                continue
            change = network.change(_towards(changes, algebra, 1.0))
            # a symmetry only at its end: what no output depends on may be anything on the way
            if change <= PRECISION < network.change(_towards(changes, algebra, 0.3)):
                missed[moves] = MissedSymmetry(kind, _ordered(spec, moves), change)
    return list(missed.values())


def _towards(changes: Mapping[str, Change], algebra: Algebra, part: float) -> Callable[[Weights], Weights]:
    """Weights on the way to the changed ones."""
    return lambda weights: {
        name: torch.lerp(weights[name], algebra.apply(change, weights[name]), part)
        for name, change in changes.items()
    }


def _ordered(spec: WeightSpec, moves: frozenset[Move]) -> tuple[Move, ...]:
    order = list(spec.tensors)
    return tuple(sorted(moves, key=lambda move: (order.index(move.tensor), move.axis, move.starts)))
