"""Orbit types: by which units a weight is indexed, and all ways to see one type on a smaller one.

Two entries of a weight space can be told apart by an equivariant map only through the units that index them.
The *orbit type* of a cell lists the groups that index it, the parents of nested ones included: ``(hidden1,
hidden0)`` for the weight of an MLP, ``(heads0, features0 within it, hidden0)`` for a projection onto heads, the
same group twice for the weight of a recurrent layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, permutations, product
from typing import NamedTuple


class Index(NamedTuple):
    """One group that indexes a weight, and the positions, in its orbit type, of the units that it is within."""

    group: str
    parents: tuple[int, ...] = ()


OrbitType = tuple[Index, ...]
Blocks = tuple[tuple[int, ...], ...]


class Reading(NamedTuple):
    """One way to see an orbit type on a smaller one; the same thing backwards is a way to write.

    Args:
        blocks: which of its indices are set equal: all apart by themselves, or diagonals.
        kept: the block behind each index of ``onto``; the others are pooled (written: broadcast).
        onto: the smaller type.
    """

    blocks: Blocks
    kept: tuple[int, ...]
    onto: OrbitType


def arrangements(
    indices: Sequence[Index], rank: Mapping[str, int]
) -> tuple[OrbitType, list[tuple[int, ...]]]:
    """The canonical orbit type of some indices, and every order of them that gives it.

    There are several orders when indices can be exchanged: two occurrences of one group, and all within them.

    Args:
        indices: parents are positions in this sequence.
        rank: of the groups.
    """
    depths: list[int] = []
    for index in indices:  # parents come first
        depths.append(1 + max((depths[at] for at in index.parents), default=-1))
    keys = [(depth, rank[index.group]) for depth, index in zip(depths, indices, strict=True)]
    buckets = [[at for at, key in enumerate(keys) if key == wanted] for wanted in sorted(set(keys))]
    found: dict[OrbitType, list[tuple[int, ...]]] = {}
    for parts in product(*(permutations(bucket) for bucket in buckets)):
        order = tuple(at for part in parts for at in part)
        place = {at: new for new, at in enumerate(order)}
        arranged = tuple(
            Index(indices[at].group, tuple(place[parent] for parent in indices[at].parents)) for at in order
        )
        found.setdefault(arranged, []).append(order)
    canonical = min(found, key=lambda arranged: [index.parents for index in arranged])
    return canonical, found[canonical]


def readings(orbit: OrbitType, rank: Mapping[str, int]) -> list[Reading]:
    """Every way to set indices of a type equal and to keep some of the rest, in every order of what is kept.

    A nested index is kept only with those that it is within. The whole type comes first, then less and less of
    it; diagonals come last.
    """
    found = []
    for blocks in sorted(_partitions(orbit), key=len, reverse=True):
        merged = merge(orbit, blocks)
        for kept in closed_subsets(merged):
            place = {block: at for at, block in enumerate(kept)}
            part = [Index(merged[b].group, tuple(place[p] for p in merged[b].parents)) for b in kept]
            onto, orders = arrangements(part, rank)
            found += [Reading(blocks, tuple(kept[at] for at in order), onto) for order in orders]
    return found


def merge(orbit: OrbitType, blocks: Blocks) -> OrbitType:
    """A type whose indices are set equal within each block: one index per block."""
    of = {at: number for number, block in enumerate(blocks) for at in block}
    first = [orbit[block[0]] for block in blocks]
    return tuple(Index(index.group, tuple(of[parent] for parent in index.parents)) for index in first)


def closed_subsets(indices: Sequence[Index]) -> Iterator[tuple[int, ...]]:
    """Sets of positions that hold, with a nested index, those that it is within; larger sets first."""
    for size in range(len(indices), -1, -1):
        for kept in combinations(range(len(indices)), size):
            if all(parent in kept for at in kept for parent in indices[at].parents):
                yield kept


def _partitions(orbit: OrbitType) -> list[Blocks]:
    """Ways to set indices of one group equal; nested ones only where those that they are within are equal."""
    found: list[Blocks] = [()]
    for at, index in enumerate(orbit):
        grown = []
        for blocks in found:
            of = {member: number for number, block in enumerate(blocks) for member in block}
            within = [of[parent] for parent in index.parents]
            for number, block in enumerate(blocks):
                other = orbit[block[0]]
                if other.group == index.group and [of[parent] for parent in other.parents] == within:
                    grown.append((*blocks[:number], (*block, at), *blocks[number + 1 :]))
            grown.append((*blocks, (at,)))
        found = grown
    return found
