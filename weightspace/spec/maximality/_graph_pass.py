"""Permutations and signs: one pass over the graph finds the sets of moves that leave the outputs as they are.

The moves of one family are involutions that commute, so that sets of them are vectors over GF(2), and those that
preserve the network's function a subspace. After every operator, only those sets stay under which the computed
value is a reordering (a change of signs) of what it was. Sets of forty moves, as the residual stream of a
transformer has, are found as easily as the three of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, fx

from weightspace.spec._verify import relative_change
from weightspace.spec.maximality._moves import PRECISION, Algebra, Change, Move
from weightspace.spec.maximality._network import Network
from weightspace.spec.tracing._program import call

TRIES = 4096  # sets of moves tried at one operator


class _Generator(NamedTuple):
    """A set of moves, and what it does to the values of the graph so far, by node."""

    moves: frozenset[Move]
    changes: dict[str, Change]


_Accepted = Callable[[Sequence[_Generator]], dict[str, Change] | None]


@dataclass(frozen=True)
class GraphPass:
    """The search for sets of moves that preserve one network.

    Args:
        network: the network.
        algebra: whether moves reorder or change signs.
    """

    network: Network
    algebra: Algebra

    def preserving(self, family: Sequence[Move]) -> list[frozenset[Move]]:
        """Sets of moves of one family that span all that preserve the outputs."""
        program, shapes = self.network.program, self.network.spec.tensors
        placeholders = {name: node for node, name in program.names.items()}
        generators = [
            _Generator(
                frozenset([move]),
                {placeholders[move.tensor]: self.algebra.of(move, shapes[move.tensor].shape)},
            )
            for move in family
        ]
        for node in program.nodes:
            if node.op == "call_function" and isinstance(self.network.values[0][node.name], Tensor):
                generators = self._kept(generators, self._tensors(node), partial(self._read, node))
        for _, node in program.outputs:
            generators = self._kept(generators, {node.name}, partial(self._leave, node))
        return [generator.moves for generator in generators]

    def _read(self, node: fx.Node, subset: Sequence[_Generator]) -> dict[str, Change] | None:
        """What a set of moves does to an operator's value."""
        before: list[Tensor] = []
        after: list[Tensor] = []
        change: Change | None = None
        for values in self.network.values:  # most sets fail at the first network
            before.append(values[node.name])
            after.append(self._computed(node, subset, values))
            change = self.algebra.read(before, after)
            if change is None:
                return None
        assert change is not None
        unchanged = np.array_equal(change, self.algebra.identity(len(change)))
        return {} if unchanged else {node.name: change}

    def _leave(self, node: fx.Node, subset: Sequence[_Generator]) -> dict[str, Change] | None:
        """Whether a set of moves leaves an output as it is."""
        changes = (
            relative_change([values[node.name]], [self._moved(node, subset, values)])
            for values in self.network.values
        )
        return {} if max(changes) <= PRECISION else None

    def _tensors(self, node: fx.Node) -> set[str]:
        """The tensors that an operator reads, those within tuples as what the tuples are computed from."""
        found: set[str] = set()
        for source in node.all_input_nodes:
            is_tuple = isinstance(self.network.values[0][source.name], tuple | list)
            found |= self._tensors(source) if is_tuple else {source.name}
        return found

    def _moved(self, node: fx.Node, subset: Sequence[_Generator], values: dict[str, Any]) -> Any:
        value = values[node.name]
        if isinstance(value, tuple | list):
            return self._computed(node, subset, values)
        for generator in subset:
            if node.name in generator.changes:
                value = self.algebra.apply(generator.changes[node.name], value)
        return value

    def _computed(self, node: fx.Node, subset: Sequence[_Generator], values: dict[str, Any]) -> Any:
        return call(
            node, {source.name: self._moved(source, subset, values) for source in node.all_input_nodes}
        )

    def _kept(
        self, generators: Sequence[_Generator], names: set[str], accepted: _Accepted
    ) -> list[_Generator]:
        """A basis of the sums of generators that are accepted; the smallest sums first."""
        active = [generator for generator in generators if not names.isdisjoint(generator.changes)]
        kept = [generator for generator in generators if names.isdisjoint(generator.changes)]
        span = Span()
        for chosen in _subsets(len(active)):
            if len(span) == len(active):
                break
            vector = sum(1 << at for at in chosen)
            subset = [active[at] for at in chosen]
            changes = None if vector in span else accepted(subset)
            if changes is not None:
                span.add(vector)
                kept.append(self._sum(subset, changes))
        return kept

    def _sum(self, subset: Sequence[_Generator], latest: dict[str, Change]) -> _Generator:
        moves: frozenset[Move] = frozenset()
        merged: dict[str, Change] = {}
        for generator in subset:
            moves = moves ^ generator.moves
            for name, change in generator.changes.items():
                known = merged.get(name, self.algebra.identity(len(change)))
                merged[name] = self.algebra.compose(known, change)
        return _Generator(moves, merged | latest)


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    sizes = range(1, count + 1)
    return islice((chosen for size in sizes for chosen in combinations(range(count), size)), TRIES)


class Span:
    """Vectors over GF(2), as the bits of integers."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def _reduced(self, vector: int) -> int:
        while vector and (row := self._rows.get(vector.bit_length())) is not None:
            vector ^= row
        return vector

    def __contains__(self, vector: int) -> bool:
        return not self._reduced(vector)

    def add(self, vector: int) -> None:
        """One more vector."""
        vector = self._reduced(vector)
        if vector:
            self._rows[vector.bit_length()] = vector
