"""Atoms: the index ranges whose units may be interchangeable, and what is known about them.

Tracing begins with the largest conceivable group, in which every axis of every parameter moves freely, and
restricts it, operator by operator, until each operator is equivariant. An *atom* is one range of indices with
a permutation of its own, which may depend on the index of its *parents*. Every step here (merging two atoms,
splitting one as a product or as a sum, pinning it, dropping a parent) passes to a subgroup, and equivariance
survives restriction: one forward pass is sound, and nothing is ever checked twice.

Two atoms that are parents of each other stand for the permutations of their joint index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Product(NamedTuple):
    """The index is ``outer * inner_size + inner``."""

    outer: int
    inner: int


class Sum(NamedTuple):
    """The index runs through the parts, one after the other."""

    parts: tuple[int, ...]


class Case(NamedTuple):
    """A copy for each part of the parent ``on``, which was cut."""

    on: int
    copies: tuple[int, ...]


@dataclass(slots=True)
class Atom:
    """One range of indices.

    Args:
        size: number of indices.
        parents: atoms on whose index the permutation may depend: an upper bound, closed under parents.
        pinned: why the units may not move; None while they may.
        link: what replaced this atom.
        children: atoms that have this one as a parent.
        activation: name of the first activation that these units apply.
        heads: whether a softmax or an attention runs once per index.
    """

    size: int
    parents: set[int] = field(default_factory=set)
    pinned: str | None = None
    link: int | Product | Sum | Case | None = None
    children: set[int] = field(default_factory=set)
    activation: str | None = None
    heads: bool = False


class Atoms:
    """All atoms of one trace. Every method that changes something passes to a subgroup."""

    def __init__(self) -> None:
        self._atoms: list[Atom] = []
        self._joint: dict[int, int] = {}
        self._members: dict[int, tuple[int, int]] = {}

    def __getitem__(self, number: int) -> Atom:
        return self._atoms[number]

    def __len__(self) -> int:
        return len(self._atoms)

    def fresh(self, size: int, parents: Iterable[int] = (), pinned: str | None = None) -> int:
        """A new atom; a pinned one has no parents."""
        self._atoms.append(Atom(size, pinned=pinned))
        number = len(self._atoms) - 1
        self._set_parents(number, set(parents) if pinned is None else set())
        return number

    def entangle(self, numbers: Sequence[int]) -> None:
        """Let fresh atoms all depend on each other: together they are one joint index."""
        for number in numbers:
            if self.is_live(number):
                self._set_parents(number, set(numbers) - {number})

    def find(self, number: int) -> int:
        """The atom into which this one was merged."""
        link = self._atoms[number].link
        while isinstance(link, int):
            number, link = link, self._atoms[link].link
        return number

    def is_live(self, number: int) -> bool:
        """Whether its units may move."""
        return self._atoms[number].pinned is None

    def is_inert(self, number: int) -> bool:
        """Whether it is a plain fixed index that nothing depends on."""
        atom = self._atoms[number]
        return atom.pinned is not None and not atom.children

    # -- restrictions --------------------------------------------------------------------------------------

    def pin(self, number: int, reason: str) -> None:
        """Let the units move no more; what depends on their index still may."""
        atom = self._atoms[number]
        if atom.pinned is None:
            atom.pinned = reason
            self._set_parents(number, set())

    def release(self, number: int) -> None:
        """Let nothing depend on this atom's index any more."""
        children = self._atoms[number].children
        self.restrict({child: self._atoms[child].parents - {number} for child in children})

    def restrict(self, allowed: Mapping[int, set[int]]) -> None:
        """Keep, for each of some atoms, a closed set of parents within those allowed.

        All at once: one by one, an atom would lose a parent that is about to lose what is not allowed itself.
        """
        kept = {number: self._atoms[number].parents & within for number, within in allowed.items()}
        waiting = list(kept)
        while waiting:
            number = waiting.pop()
            closed = kept[number] | {number}
            lost = {p for p in kept[number] if not kept.get(p, self._atoms[p].parents) <= closed}
            if lost:
                kept[number] -= lost
                waiting.append(number)
        for number, parents in kept.items():
            if parents != self._atoms[number].parents:
                self._set_parents(number, parents)

    def merge(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Identify atoms: all pairs first, and only then intersect what their permutations depend on."""
        absorbed: dict[int, list[int]] = {}
        for first, second in pairs:
            keep, drop = sorted((self.find(first), self.find(second)))
            if keep == drop:
                continue
            assert self._atoms[keep].size == self._atoms[drop].size
            assert self._atoms[keep].link is None
            assert self._atoms[drop].link is None
            self._atoms[drop].link = keep
            absorbed.setdefault(keep, []).extend([drop, *absorbed.pop(drop, [])])
        for keep, dropped in absorbed.items():
            self._inherit(keep, dropped)
        self.restrict({keep: self._atoms[keep].parents for keep in absorbed})

    def _inherit(self, keep: int, dropped: Sequence[int]) -> None:
        members = [self._atoms[number] for number in (keep, *dropped)]
        first = self._atoms[keep]
        reasons = [atom.pinned for atom in members if atom.pinned is not None]
        if reasons:
            first.pinned = reasons[0]
        first.activation = next((atom.activation for atom in members if atom.activation), None)
        first.heads = any(atom.heads for atom in members)
        sets = [{self.find(parent) for parent in atom.parents} - {keep} for atom in members]
        common = set() if first.pinned is not None else set.intersection(*sets)
        children = {self.find(child) for atom in members for child in atom.children} - {keep}
        for number in dropped:
            self._set_parents(number, set())
        self._set_parents(keep, common)
        for child in children:
            old = self._atoms[child].parents
            self._set_parents(child, {self.find(parent) for parent in old} - {child})

    # -- structure -----------------------------------------------------------------------------------------

    def split(self, number: int, inner_size: int) -> Product:
        """Write the index as (outer, inner); the two depend on each other until a rule says otherwise."""
        atom = self._atoms[number]
        outer = self.fresh(atom.size // inner_size, atom.parents, atom.pinned)
        inner = self.fresh(inner_size, atom.parents, atom.pinned)
        if atom.pinned is None:
            self._set_parents(outer, atom.parents | {inner})
            self._set_parents(inner, atom.parents | {outer})
        for child in list(atom.children):
            self._set_parents(child, self._atoms[child].parents - {number} | {outer, inner})
        self._set_parents(number, set())
        self._copy_notes(atom, outer, inner)
        atom.link = Product(outer, inner)
        return atom.link

    def cut(self, number: int, sizes: Sequence[int]) -> Sum:
        """Cut the index into consecutive parts; all that depends on it gets a copy for each part."""
        atom = self._atoms[number]
        assert sum(sizes) == atom.size
        dependents = sorted(atom.children)
        copies: dict[int, list[int]] = {at: [] for at in (number, *dependents)}
        for size in sizes:
            part = {at: self._copy(at, size if at == number else None) for at in copies}
            for at, copy in part.items():
                inherited = {part.get(parent, parent) for parent in self._atoms[at].parents}
                alone = {new for new in part.values() if self._atoms[new].size == 1}
                if self.is_live(copy):
                    self._set_parents(copy, inherited - alone)
                copies[at].append(copy)
        for at in copies:
            self._set_parents(at, set())
        for at in dependents:
            self._atoms[at].link = Case(number, tuple(copies[at]))
        atom.link = Sum(tuple(copies[number]))
        return atom.link

    def fuse(self, outer: int, inner: int) -> int:
        """One atom for the joint index of two that depend on each other; undoes :meth:`split`."""
        parents = (self._atoms[outer].parents | self._atoms[inner].parents) - {outer, inner}
        joint = self.fresh(self._atoms[outer].size * self._atoms[inner].size, parents)
        for child in (self._atoms[outer].children | self._atoms[inner].children) - {outer, inner}:
            self._set_parents(child, self._atoms[child].parents - {outer, inner} | {joint})
        self._copy_notes(self._atoms[inner], joint)
        self._atoms[joint].heads |= self._atoms[outer].heads
        for number in (outer, inner):
            self._set_parents(number, set())
            self._joint[number] = joint
        self._members[joint] = (outer, inner)
        return joint

    def final(self, number: int) -> int:
        """The atom that this one has become by merging and fusing."""
        number = self.find(number)
        while number in self._joint:
            number = self._joint[number]
        return number

    def constituents(self, number: int) -> list[int]:
        """The atoms that were fused into this one, outermost first; itself if none were."""
        members = self._members.get(number)
        return [number] if members is None else [part for at in members for part in self.constituents(at)]

    def leaves(self, number: int) -> list[int]:
        """What this atom has become."""
        number = self.find(number)
        link = self._atoms[number].link
        if link is None:
            return [number]
        after = link.copies if isinstance(link, Case) else link.parts if isinstance(link, Sum) else link
        return [leaf for part in after for leaf in self.leaves(part)]  # type: ignore[union-attr]

    def mark(self, numbers: Iterable[int], note: Callable[[Atom], None]) -> None:
        """Write something down about atoms; no restriction."""
        for number in numbers:
            note(self._atoms[self.find(number)])

    def _copy(self, number: int, size: int | None) -> int:
        atom = self._atoms[number]
        copy = self.fresh(atom.size if size is None else size, (), atom.pinned)
        self._copy_notes(atom, copy)
        return copy

    def _copy_notes(self, atom: Atom, *copies: int) -> None:
        for copy in copies:
            self._atoms[copy].activation, self._atoms[copy].heads = atom.activation, atom.heads

    def _set_parents(self, number: int, parents: set[int]) -> None:
        atom = self._atoms[number]
        for parent in atom.parents - parents:
            self._atoms[parent].children.discard(number)
        for parent in parents - atom.parents:
            self._atoms[parent].children.add(number)
        atom.parents = parents
